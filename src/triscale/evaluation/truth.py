"""From what a set holds to what it is scored by: its class names, prompts, masks and right labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from triscale.data.captions import LABEL_SEPARATOR, label_text, read_labels
from triscale.data.lists import did_you_mean, parse_classnames, parse_templates, quote
from triscale.data.samples import BadSample, PartlyUsed, Sample, Source
from triscale.errors import RunError, UsageError
from triscale.evaluation.layouts import CLASSNAMES_FILE, TEMPLATES_FILE, Opened, SetOptions
from triscale.evaluation.places import RemoteSet
from triscale.evaluation.prompts import named_classes, named_templates
from triscale.evaluation.sets import LABELS_CHECKED_AT_OPENING, EvaluationSet
from triscale.evaluation.sidecars import (
    LEVELS_FILE,
    MAPPING_FILE,
    RIGHT_LABELS_FILE,
    SLICES_FILE,
    ClassList,
    read_levels,
    read_mapping,
    read_right_labels,
    read_slices,
)

SHOWN_FAULTS = 3


class Survey:
    """All samples of a source without their images, gone through once, when they are asked for."""

    def __init__(self, source: Source) -> None:
        self._source = source

    @cached_property
    def samples(self) -> list[Sample]:
        """In their order; one that cannot be read has no label. Raises RunError where reading fails."""
        return [self._sample(index) for index in range(len(self._source))]

    def keys(self) -> list[str]:
        """Of all samples, "" where it is not known."""
        return [sample.key for sample in self.samples]

    def label_names(self) -> tuple[str, ...]:
        """What samples have for labels, distinct and sorted; none where all are numbers."""
        found = {part.strip() for text in self.texts() for part in text.split(LABEL_SEPARATOR)} - {""}
        return () if all(name.isdigit() for name in found) else tuple(sorted(found))

    def texts(self) -> dict[str, Sample]:
        """What stands for labels, distinct, with the first sample of each; "" stands for none."""
        found: dict[str, Sample] = {}
        for sample in self.samples:
            try:
                found.setdefault(label_text(sample), sample)
            except BadSample as fault:
                raise UsageError(f"{self._source.name}, sample {quote(sample.key)}: {fault.reason}") from fault
        return found

    def _sample(self, index: int) -> Sample:
        try:
            sample = self._source.read(index, image=False)
            return Sample(key=sample.key, image=b"", label=sample.label)
        except BadSample as fault:
            return Sample(key=fault.key or "", image=b"")
        except OSError as error:
            raise RunError(f"{self._source.name}: sample {index} could not be read: {error}") from error


def make_set(opened: Opened, options: SetOptions) -> EvaluationSet:
    """The evaluation set of what was opened.

    Raises:
        UsageError: class names or templates are missing or wrong, or labels do not go with them, or a file beside the
            samples is not of the documented form.
    """
    source, files = opened.source, opened.files
    skipped = len(source.skipped) if isinstance(source, PartlyUsed) else 0
    if opened.task == "retrieval":
        return EvaluationSet(name=opened.name, task="retrieval", source=source, skipped=skipped)
    survey = Survey(source)
    if opened.distinct_keys:
        _check_distinct(opened.name, survey.keys())
    label_names = opened.label_names
    if opened.names_for_labels and not label_names:
        label_names = survey.label_names()
    names = _classnames(opened, options, label_names)
    classes = ClassList(names)
    mapping = read_mapping(files[MAPPING_FILE], classes, label_names) if MAPPING_FILE in files else None
    right = read_right_labels(files[RIGHT_LABELS_FILE], classes, survey.keys) if RIGHT_LABELS_FILE in files else None
    levels = read_levels(files[LEVELS_FILE], classes) if LEVELS_FILE in files else {}
    distinct = {name: place for place, name in enumerate(dict.fromkeys(names))}
    class_of_label = tuple(distinct[name] for name in names)
    made = EvaluationSet(
        name=opened.name,
        task="classification",
        source=source,
        classnames=tuple(distinct),
        templates=_templates(opened, options),
        class_of_label=class_of_label,
        skipped=skipped,
        allowed=None if mapping is None else _allowed(mapping, class_of_label),
        multi_label=mapping is not None or right is not None,
        right_labels=right,
        levels={
            level: tuple(groups[classes.label(name, level)] for name in distinct) for level, groups in levels.items()
        },
        slices=read_slices(files[SLICES_FILE], survey.keys) if SLICES_FILE in files else {},
    )
    return made if right is not None else _with_own_labels(made, opened, label_names, names, mapping, survey)


def _with_own_labels(
    made: EvaluationSet,
    opened: Opened,
    label_names: Sequence[str],
    names: Sequence[str],
    mapping: dict[int, tuple[int, ...]] | None,
    survey: Survey,
) -> EvaluationSet:
    """The set with what its samples' own labels mean, after they were looked at."""
    if opened.names_for_labels and not opened.label_names:
        # Names that stand in samples are those of classes, or of what a mapping maps.
        known = names if mapping is None else label_names
        numbers = {name: number for number, name in reversed(list(enumerate(known)))}
        several = _check_all(made, survey, numbers, None if mapping is not None else len(names))
        return replace(made, label_numbers=numbers, stands_for=mapping, multi_label=made.multi_label or several)
    if mapping is None and label_names:
        mapping = _match(made.name, label_names, names)
    made = replace(made, stands_for=mapping)
    if opened.names_for_labels:
        several = _check_all(made, survey, {}, len(label_names or names))
        return replace(made, multi_label=made.multi_label or several)
    # Where counts stand beside shards behind URLs, to look at more samples would be to wait for their shards.
    known_counts = isinstance(opened.source, RemoteSet) and opened.source.counted
    made.check_labels(1 if known_counts else LABELS_CHECKED_AT_OPENING)
    return made


def _match(name: str, label_names: Sequence[str], names: Sequence[str]) -> dict[int, tuple[int, ...]] | None:
    """For the labels of a source that names them, the label of the class list of the same name.

    None where the class list gives them other names, in their order. Raises UsageError where it is neither.
    """
    numbers = {each: number for number, each in reversed(list(enumerate(names)))}
    unknown = [each for each in label_names if each not in numbers]
    if not unknown:
        return {label: (numbers[each],) for label, each in enumerate(label_names)}
    if len(unknown) < len(label_names):
        raise UsageError(
            f"evaluation set {quote(name)}: {len(unknown)} of its {len(label_names)} classes are not among the "
            f"{len(names)} class names: {quote(unknown[0])}; {did_you_mean(unknown[0], names)}"
        )
    if len(names) != len(label_names):
        raise UsageError(
            f"evaluation set {quote(name)}: {len(names)} class names for samples of {len(label_names)} other classes, "
            f"the first of which is {quote(label_names[0])}; {MAPPING_FILE} would say which is which"
        )
    return None


def _classnames(opened: Opened, options: SetOptions, label_names: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the labels of the class list: the user's, the set's, or those that its samples' labels have."""
    if options.classes:
        return named_classes(options.classes)
    if CLASSNAMES_FILE in opened.files:
        file = opened.files[CLASSNAMES_FILE]
        return parse_classnames(file.content, file.where)
    _check_needed(opened, CLASSNAMES_FILE)
    if not label_names:
        raise UsageError(
            f"evaluation set {quote(opened.name)}: there are no class names for its labels; name them with --classes "
            f"FILE, a name on each line"
        )
    return _printable(opened.name, label_names)


def _printable(name: str, classnames: tuple[str, ...]) -> tuple[str, ...]:
    for classname in classnames:
        if not classname.isprintable() or not classname.strip():
            raise UsageError(
                f"evaluation set {quote(name)}: class {quote(classname)}: its name holds unprintable characters or none"
            )
    return classnames


def _templates(opened: Opened, options: SetOptions) -> tuple[str, ...]:
    if options.templates:
        return named_templates(options.templates)
    if TEMPLATES_FILE in opened.files:
        file = opened.files[TEMPLATES_FILE]
        return parse_templates(file.content, file.where)
    _check_needed(opened, TEMPLATES_FILE)
    return opened.templates or ("{c}",)


def _check_needed(opened: Opened, name: str) -> None:
    if name in opened.needs:
        option = {CLASSNAMES_FILE: "--classes", TEMPLATES_FILE: "--templates"}[name]
        raise UsageError(f"{quote(opened.needs[name])}: there is no such file; {option} FILE would be in its place")


def _allowed(mapping: Mapping[int, tuple[int, ...]], class_of_label: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted({class_of_label[label] for labels in mapping.values() for label in labels}))


def _check_distinct(name: str, keys: Sequence[str]) -> None:
    seen: set[str] = set()
    for key in keys:
        if key and key in seen:
            raise UsageError(
                f"evaluation set {quote(name)}: {quote(key)} is listed twice; several labels go in one cell, with "
                f"{LABEL_SEPARATOR} between them"
            )
        seen.add(key)


def _check_all(made: EvaluationSet, survey: Survey, numbers: Mapping[str, int], count: int | None) -> bool:
    """Whether any sample has not just one label. UsageError where one is neither in `numbers` nor below `count`."""
    several, faults = False, list[str]()
    texts = survey.texts()
    for text, sample in texts.items():
        try:
            labels = read_labels(sample, numbers)
        except BadSample:
            faults.append(f"{quote(text)} (the first at {quote(sample.key)}; {did_you_mean(text, numbers)})")
            continue
        several = several or len(labels) != 1
        beyond = [label for label in labels if count is not None and label >= count]
        faults += [f"{label} is out of range (the first at {quote(sample.key)})" for label in beyond]
    where = f"evaluation set {quote(made.name)}"
    if faults:
        shown = ", ".join(faults[:SHOWN_FAULTS]) + (", ..." if len(faults) > SHOWN_FAULTS else "")
        total = len(made.class_of_label)
        raise UsageError(f"{where}: {len(faults)} labels name none of {total} classes, which count from 0: {shown}")
    if not any(texts):
        raise UsageError(f"{where}: none of its samples has a label")
    return several
