"""train.py's options: from flags, from YAML, and from both."""

import dataclasses

import pytest

from training.options import ModelOptions, Options, parse

NEEDED = ["--checkpoint-path", "x"]


@pytest.fixture
def with_yaml(tmp_path):
    """The options of a YAML text and some flags."""

    def read(text, *flags) -> Options:
        (tmp_path / "run.yaml").write_text(text)
        return parse([*NEEDED, "--train-config", str(tmp_path / "run.yaml"), *flags], "")

    return read


def test_flags_and_defaults():
    shards = ["--data-mode", "fineweb_npy", "--train-npy", "a", "b"]
    options = parse([*NEEDED, "--n-layers", "3", *shards, "--bf16"], "")
    assert options.model == ModelOptions(n_layers=3)
    assert options.model.config_fields == {"n_layers": 3}
    assert options.data.train_npy == ("a", "b") and options.data.tokenizer_name is None
    assert (options.optimization.lr, options.optimization.num_steps) == (6e-4, 1000)
    assert (options.precision.bf16, options.run.seed, options.run.resume) == (True, 42, False)
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.run.resume = True
    assert options.flags().keys() >= {"n_layers", "train_npy", "lr", "checkpoint_path", "seed"}


def test_yaml_sets_flags_and_the_command_line_wins(with_yaml):
    options = with_yaml("num_steps: 7\nlr: 0.5\nbatch_size: 3\n", "--lr", "0.25")
    optimization = options.optimization
    assert (optimization.num_steps, optimization.lr, optimization.batch_size) == (7, 0.25, 3)


def test_yaml_values_are_read_as_flags_are(with_yaml):
    options = with_yaml(
        "lr: 6e-4\ntrain_npy: [a.npy, b.npy]\nval_npy: c.npy\nresume: true\ncompile: on\n"
        "max_tokens: null\nnum_steps: 1_000\ndropout: 0\nseed: 7\ndtype: bf16\n"
        "data_mode: fineweb_npy\n"
    )
    assert options.optimization.lr == 6e-4 and options.optimization.num_steps == 1000
    assert options.data.train_npy == ("a.npy", "b.npy") and options.data.val_npy == ("c.npy",)
    assert options.run.resume is True and options.run.compile == "on"
    assert options.data.max_tokens is None and options.model.config_fields == {"dropout": 0.0}
    assert (options.run.seed, options.precision.dtype) == (7, "bf16")


def test_a_flag_that_must_be_given_may_stand_in_the_yaml(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("checkpoint_path: there\n")
    assert parse(["--train-config", str(tmp_path / "run.yaml")], "").run.checkpoint_path == "there"
    with pytest.raises(SystemExit):
        parse([], "")
    assert "--checkpoint-path" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, said",
    [
        ("num_stepz: 7", "no flag is called 'num_stepz'"),
        ("help: true", "no flag is called 'help'"),
        ("num_steps: 7.5", "--num-steps: needs a positive whole number, not '7.5'"),
        ("num_steps: [7]", "--num-steps: needs one value, not [7]"),
        ("num_steps: null", "--num-steps: needs one value, not None"),
        ("warmup_steps: many", "--warmup-steps: needs a number, not 'many'"),
        ("lr: fast", "--lr: needs a number, not 'fast'"),
        ("lr: true", "--lr: needs one value, not True"),
        ("resume: 1", "--resume: needs true or false, not 1"),
        ("lr_scheduler: cos", "--lr-scheduler: must be one of cosine, linear, constant, wsd, not"),
        ("compile: sometimes", "--compile: must be one of auto, on, off, not 'sometimes'"),
        ("train_npy: [a.npy, [b.npy]]", "--train-npy: needs one value, not ['b.npy']"),
        ("train_npy: []", "--train-npy: needs a value"),
    ],
)
def test_a_wrong_value_in_the_yaml_is_one_line_with_file_and_field(with_yaml, text, said):
    with pytest.raises(ValueError) as caught:
        with_yaml(text)
    message = str(caught.value)
    assert "run.yaml: " in message and said in message and "\n" not in message


def test_contradictions_are_refused(with_yaml, capsys):
    with pytest.raises(SystemExit):
        with_yaml("resume: true", "--init-from", "y")
    assert "--resume and --init-from contradict each other" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, said",
    [
        ("--train-npy x", "--train-npy does not go with --data-mode text"),
        ("--train-data a --val-npy x", "--val-npy does not go with --data-mode text"),
        ("--data-mode fineweb_npy --train-npy x --val-data a", "--val-data does not go with"),
        ("--train-data a --val-data b --val-ratio 0.1", "--val-ratio does not go with --val-data"),
        ("--train-data a --val-max-tokens 9", "--val-max-tokens needs --val-data"),
        ("--use-toy-data --train-data a", "--train-data does not go with --use-toy-data"),
        ("--lr -1", "--lr must be 0 or more, not -1"),
        ("--weight-decay nan", "--weight-decay must be 0 or more, not nan"),
        ("--warmup-steps -5", "--warmup-steps must be 0 or more, not -5"),
        ("--beta2 1", "--beta2 must be 0 or more, and below 1, not 1"),
        ("--packing-noise mask:8", "--packing-noise needs --packing noise"),
        ("--decay-shape sqrt", "--decay-shape goes with --lr-scheduler wsd"),
        ("--lora-dropout 0", "--lora-dropout needs --lora-rank"),
        ("--use-toy-data --tokenizer-name gpt2", "--tokenizer-name does not go with --use-toy-"),
    ],
)
def test_no_flag_is_ignored(words, said):
    with pytest.raises(ValueError, match=said):
        parse([*NEEDED, *words.split()], "")


def test_toy_data_chooses_a_small_model_unless_one_is_chosen():
    toy = parse([*NEEDED, "--use-toy-data"], "")
    assert toy.model == ModelOptions(config="nano") and toy.optimization.seq_len == 256
    assert (toy.data.data_mode, toy.data.tokenizer_name) == ("text", "byte")
    assert toy.data.val_ratio == 0.1 and any("train.py" in name for name in toy.data.train_data)
    longer = parse([*NEEDED, "--use-toy-data", "--seq-len", "512"], "")
    assert longer.optimization.seq_len == 512, "which the model refuses: nothing is cut in silence"
    chosen = parse([*NEEDED, "--use-toy-data", "--n-layers", "2", "--val-ratio", "0.2"], "")
    assert chosen.model == ModelOptions(n_layers=2) and chosen.optimization.seq_len == 1024
    assert chosen.data.val_ratio == 0.2


@pytest.mark.parametrize("in_file", [False, True])
def test_what_is_given_at_its_default_is_given(with_yaml, in_file):
    """With toy data these would else be others; what only varies a model chooses none."""
    if in_file:
        options = with_yaml("use_toy_data: true\nseq_len: 1024\nval_ratio: 0\ndropout: 0.0\n")
    else:
        words = "--use-toy-data --seq-len 1024 --val-ratio 0 --dropout 0"
        options = parse([*NEEDED, *words.split()], "")
    assert (options.optimization.seq_len, options.data.val_ratio) == (1024, 0)
    assert options.model == ModelOptions(config="nano", dropout=0.0)
    varied = parse([*NEEDED, "--use-toy-data", "--dropout", "0.1", "--activation", "relu"], "")
    assert varied.model == ModelOptions(config="nano", dropout=0.1, activation="relu")
    assert varied.optimization.seq_len == 256
