"""`triscale data`: index, stats, pack and tokenizer, from their options to what they print."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from triscale.assembly import captions_of
from triscale.data.captions import CaptionRules
from triscale.data.indexing import index_shards
from triscale.data.named_tokenizers import read_tokenizer
from triscale.data.pack import pack_scenes, write_shards
from triscale.data.paths import matching_files, split_patterns
from triscale.data.sources import open_source, split_kind
from triscale.data.stats import measure
from triscale.data.stats_page import stats_page, summary
from triscale.data.text import SentencePieceTokenizer, train_tokenizer
from triscale.data.tokenizer import open_tokenizer
from triscale.errors import UsageError
from triscale.evaluation.tables import printable
from triscale.options import IndexOptions, PackOptions, StatsOptions, TokenizerOptions

Report = Callable[[str], None]
LONGEST_NAME = 100


def index(options: IndexOptions, report: Report) -> tuple[list[dict[str, Any]], int]:
    """Index shards; returns what became of each as JSON values, and the exit status: 1 where some are damaged."""
    if not options.shards:
        raise UsageError('which shards? triscale data index "train/*.tar"')
    patterns: list[str] = []
    for spec in options.shards:
        kind, rest = split_kind(spec)
        if kind not in ("", "tar"):
            raise UsageError(f"{spec} has no shards: only tar shards have an index")
        patterns += split_patterns(rest, options.root)
    shards = index_shards(matching_files(patterns, options.root), check=options.check, workers=options.workers)
    outcomes = Counter(shard.outcome for shard in shards)
    skipped = Counter[str]()
    for shard in shards:
        skipped.update(shard.skipped)
        if shard.outcome == "damaged":
            report(shard.fault)
    rows = [
        ("shards", f"{len(shards):,}"),
        ("samples", f"{sum(shard.holds.samples for shard in shards):,}"),
        *((f"index {outcome}", f"{count:,}") for outcome, count in outcomes.items() if outcome != "damaged"),
        *((f"not used: {reason}", f"{count:,}") for reason, count in skipped.most_common()),
        *([("damaged shards", f"{outcomes['damaged']:,}")] if outcomes["damaged"] else []),
    ]
    _print_table(rows)
    values = [
        {
            "shard": shard.path,
            "outcome": shard.outcome,
            "samples": shard.holds.samples,
            "skipped": shard.skipped,
            "fault": shard.fault or None,
        }
        for shard in shards
    ]
    return values, 1 if outcomes["damaged"] else 0


def stats(options: StatsOptions) -> dict[str, Any]:
    """Measure a source, print and write the page; returns the figures as JSON values."""
    if options.samples < 0 or options.workers < 0:
        raise UsageError("--samples and --workers must be at least 0")
    tokenizer = open_tokenizer(read_tokenizer(options.tokenizer), options.tokens) if options.tokenizer else None
    source = open_source(options.source, options.root, options.columns)
    found = measure(
        source,
        fields=options.fields,
        tokenizer=tokenizer,
        samples=options.samples or None,
        workers=options.workers,
    )
    if options.html:
        _write(options.html, stats_page(found).encode())
    _print_table([*summary(found), *((f"bad: {reason}", f"{count:,}") for reason, count in found.bad.items())])
    return found.values()


def pack(options: PackOptions, report: Report) -> None:
    """Write a source as shards; bad samples are left out and counted. Scenes with their evaluation sets."""
    if options.source == "scenes":
        pack_scenes(
            options.folder,
            size=options.size,
            seed=options.seed,
            train_samples=options.train_samples,
            eval_samples=options.eval_samples,
        )
        print(f"{options.folder}: train/*.tar and evaluation sets wds_*")
        return
    source = open_source(options.source, options.root, options.columns)
    bad: Counter[str] = Counter()
    shards = write_shards(
        source,
        options.folder,
        options.samples_per_shard,
        max_side=options.max_side,
        leave_out=lambda key, reason: bad.update([reason]),
    )
    for reason, count in bad.most_common():
        report(f"left out: {count:,} {reason}")
    print(f"{options.folder}: {len(source) - bad.total():,} samples in {len(shards):,} shards")


def tokenizer(options: TokenizerOptions) -> None:
    """Train a tokenizer and write it."""
    source = open_source(options.source, "", options.columns)
    model = train_tokenizer(captions_of(source, CaptionRules(fields=options.fields)), options.vocabulary)
    _write(options.output, model)
    print(f"{options.output}: {SentencePieceTokenizer(model, length=2).vocabulary_size} tokens")


def _write(path: str, content: bytes) -> None:
    try:
        Path(path).write_bytes(content)
    except OSError as error:
        raise UsageError(f"{path!r} cannot be written: {error.strerror}") from error


def _print_table(rows: Sequence[tuple[str, str]]) -> None:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column(justify="right")
    for name, value in rows:
        table.add_row(printable(name, LONGEST_NAME), value)
    Console(highlight=False).print(table)
