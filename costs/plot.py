"""A training step's memory over time as a picture. Needs matplotlib.

plot_timeline(estimate_memory(config, 8, 1024), "step.png")
"""


def plot_timeline(memory: dict, path: str) -> None:
    """Stacked parts over the events of a step. Needs matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    timeline = memory["timeline"]
    parts = list(dict.fromkeys(part for event in timeline for part in event["parts"]))
    heights = [[event["parts"].get(part, 0) / 2**30 for event in timeline] for part in parts]
    figure, axes = plt.subplots(figsize=(10, 5))
    axes.stackplot(range(len(timeline)), heights, labels=parts)
    labels = ("load", "end of forward", "optimizer step")
    shown = [i for i, event in enumerate(timeline) if event["event"] in labels]
    axes.set_xticks(shown, labels)
    axes.margins(x=0)
    axes.set_ylabel("GiB allocated")
    axes.set_title(f"peak {memory['peak_bytes'] / 2**30:.4g} GiB at: {memory['peak_at']}")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:  # ValueError: no kind of picture that it knows
        why = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"--plot {path} cannot be written: {why}") from None
