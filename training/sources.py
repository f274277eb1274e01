"""What a run is trained on: streams, packed into windows, mixed into batches.

data = open_data(options.data, tokenizer, seq_len)
batches, counts = make_batches(options, data, tokenizer, dist)
"""

from dataclasses import dataclass
from fractions import Fraction

from dataset import TokenStream, Windows, open_stream
from distributed import Dist, print0
from formats.documents import mark_of
from tokenizer import Tokenizer
from training.batches import TrainBatches
from training.mixing import read_mix
from training.options import DataOptions, Options
from training.packing import Counts
from training.plans import Packer


@dataclass(frozen=True)
class Data:
    """Streams to train on with their weights, and one to validate on with its windows, or None."""

    streams: list[TokenStream]
    weights: list[Fraction]
    validation: tuple[TokenStream, Windows] | None

    def check_vocab(self, vocab_size: int) -> None:
        """ValueError, naming the file, for an id that the model does not have."""
        for stream in self.streams + ([self.validation[0]] if self.validation else []):
            stream.check_vocab(vocab_size)


def open_data(data: DataOptions, tokenizer: Tokenizer, seq_len: int) -> Data:
    """The files that the options name. Validation sees documents as training does."""
    kind = "data" if data.data_mode == "text" else "npy"
    files, val_files = getattr(data, f"train_{kind}"), getattr(data, f"val_{kind}")
    if not files and not data.mix:
        raise ValueError(f"--data-mode {data.data_mode} needs --train-{kind} FILE …")

    def opened(files, limit):
        width = data.token_dtype
        return open_stream(data.data_mode, files, tokenizer, limit, token_dtype=width)

    parts = read_mix(data.mix) if data.mix else [(files, Fraction(1))]
    streams = [opened(part, data.max_tokens) for part, _ in parts]
    val_stream = opened(val_files, data.val_max_tokens) if val_files else None
    if data.val_ratio:
        streams[0], val_stream = streams[0].split(data.val_ratio)
    validation = None
    if val_stream is not None:
        mark = mark_of(val_stream, tokenizer, data.data_mode) if data.within_documents else None
        validation = val_stream, Windows(len(val_stream), seq_len, mark=mark)
    return Data(streams, [weight for _, weight in parts], validation)


def make_batches(
    options: Options, data: Data, tokenizer: Tokenizer, dist: Dist
) -> tuple[TrainBatches, list[Counts]]:
    """The batches of a run, and what became of each source's documents where --packing was given;
    it is printed too."""
    optimization, seed = options.optimization, options.run.seed
    seed = seed if options.data.data_seed is None else options.data.data_seed
    if not 0 <= seed < 2**32:
        raise ValueError(f"the seed must lie in 0…2^32 - 1, not {seed}")
    packer = Packer(options.data, tokenizer, optimization.seq_len, seed, dist)
    rows, counts = zip(*map(packer.pack, data.streams))
    per_step = optimization.batch_size * optimization.grad_accum_steps * dist.world_size
    batches = TrainBatches(rows, per_step, seed, optimization.grad_accum_steps, data.weights)
    for part in filter(None, counts):
        print0(f"{options.data.packing} packing: {part.words}")
    if options.data.mix:
        ends = batches.epochs(optimization.num_steps)
        for word, share, epochs in zip(options.data.mix, batches.schedule.shares, ends):
            print0(f"mix: {word}: {float(share):.4%} of the windows, {epochs:.2f} epochs in all")
    return batches, [part for part in counts if part is not None]
