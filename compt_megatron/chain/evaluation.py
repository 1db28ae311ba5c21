"""Evaluation of a model in training and of a checkpoint, on the sets that a recipe names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from compt_megatron.chain.member import Member
from compt_megatron.chain.progress import Position
from compt_megatron.chain.record import EvaluationRecord
from compt_megatron.chain.text import open_text, vocabulary
from compt_megatron.checkpoint.formats import open_reader
from compt_megatron.data.evaluation import EvalSet
from compt_megatron.data.source import ShardSource
from compt_megatron.data.text.batch import TokenBatch
from compt_megatron.data.text.loader import HeldOutLoader
from compt_megatron.data.text.source import TextSource
from compt_megatron.data.text.tokenizer import FILE as TOKENIZER
from compt_megatron.data.tokenizer import build_tokenizer
from compt_megatron.data.transforms import eval_transform
from compt_megatron.engine.runtime import Runtime
from compt_megatron.engine.topology import Topology
from compt_megatron.engine.training_step import TrainingEngine
from compt_megatron.errors import UserError
from compt_megatron.evaluate.perplexity import Losses, losses_of, perplexity
from compt_megatron.evaluate.run import evaluate
from compt_megatron.models.build import build_language_model, build_model
from compt_megatron.models.groups import lone_groups
from compt_megatron.models.language import LanguageModel
from compt_megatron.models.part import ModelPart
from compt_megatron.models.state import load_canonical
from compt_megatron.observe.console import Console
from compt_megatron.observe.metrics import RunLog
from compt_megatron.recipe.data_section import DataSettings
from compt_megatron.recipe.sections import EvaluateSettings
from compt_megatron.share import total
from compt_megatron.spec.table import ModelSpec

_EVALUATED_TOKENS = 16_384  # of a language model's batch, on each rank
RETRIEVAL_CAPTIONS = 5  # of each image, as COCO and Flickr30k are scored
Metrics = dict[str, dict[str, Any]]
Encode = Callable[[torch.Tensor], torch.Tensor]


class Sharing(NamedTuple):
    """Which share of the rows this rank evaluates, and the sum over those who evaluate the others."""

    rank: int
    world: int
    reduce: Callable[[torch.Tensor], torch.Tensor]

    @classmethod
    def of(cls, topology: Topology) -> Sharing:
        """The ranks of one copy of the model evaluate the same rows."""
        return cls(topology.data_rank, topology.data, lambda values: total(values, topology.data_group))


class Evaluator:
    """Evaluates one member and keeps its record, RUN/<member>/evaluation.jsonl (rank 0 writes)."""

    def __init__(self, member: Member, run_dir: Path, runtime: Runtime, log: RunLog, console: Console) -> None:
        self._member, self._runtime, self._log, self._console = member, runtime, log, console
        self._record = EvaluationRecord(run_dir / member.name)
        self._cache_dir = run_dir / "cache"
        self._sets: dict[tuple[int, int], list[EvalSet]] = {}  # by rank and number of those that share the rows
        self._texts: list[TextSource] = []

    def prepare(self) -> None:
        """Open the texts of a language model, and check them, before they are needed. Collective."""
        member, data = self._member, self._member.settings.data
        if member.spec.is_language_model and not self._texts:
            with self._runtime.main_first():
                self._texts = [open_text(member.spec, name, data.tokenizer) for name in data.eval]

    def __call__(self, engine: TrainingEngine, position: Position) -> None:
        """Evaluate the model in training. Collective."""
        if self._member.spec.is_language_model:
            self._keep(self._perplexities(_losses_in_training(engine), Sharing.of(engine.topology)), position)
            return
        encode_text = (lambda texts: engine.eval_features(texts=texts)["text"]) if self._has_text else None
        sharing = Sharing.of(engine.topology)
        found = self._evaluate(lambda images: engine.eval_features(images=images)["image"], encode_text, sharing)
        self._keep(found, position)

    def checkpoint(self, path: Path, position: Position) -> None:
        """Evaluate a checkpoint of the member. Collective."""
        sharing = Sharing(self._runtime.rank, self._runtime.world, self._runtime.sum)
        if self._member.spec.is_language_model:
            losses = losses_of(language_model(path, self._runtime), self._member.settings.objective.chunk)
            self._keep(self._perplexities(losses, sharing), position)
            return
        encode_image, encode_text = encoders(path, self._runtime)
        self._keep(self._evaluate(encode_image, encode_text, sharing), position)

    def latest(self) -> Metrics:
        """The newest record, empty where there is none. Collective: rank 0 alone knows when the file is written."""
        return self._runtime.exchange(self._record.latest("metrics") if self._runtime.is_main else {})[0]

    @property
    def _has_text(self) -> bool:
        return "text" in self._member.spec.towers

    def _evaluate(self, encode_image: Encode, encode_text: Encode | None, sharing: Sharing) -> Metrics:
        settings, spec = self._member.settings, self._member.spec
        place = sharing.rank, sharing.world
        if place not in self._sets:
            self._sets[place] = open_sets(
                settings.data.eval, spec, self._runtime, sharing, self._cache_dir, settings.data
            )
        return run_evaluation(self._sets[place], spec, settings.evaluate, encode_image, encode_text, sharing)

    def _perplexities(self, losses: Losses, sharing: Sharing) -> Metrics:
        member, settings = self._member, self._member.settings
        self.prepare()
        parallel = settings.parallel
        multiple = parallel.pipeline if parallel.virtual > 1 else 1  # what an interleaved pipeline wants of rows
        rows = evaluation_rows(settings.evaluate, member.length, multiple)
        return perplexities(
            self._texts,
            settings.data.eval,
            losses,
            member.length,
            rows,
            sharing,
            self._runtime,
            vocabulary(member.spec),
        )

    def _keep(self, metrics: Metrics, position: Position) -> None:
        if not metrics or not self._runtime.is_main:
            return
        self._record.add(position, metrics=metrics)
        self._console.evaluate(self._member.name, position.step, metrics)
        self._log.evaluation(self._member.name, position.step, metrics)


def _losses_in_training(engine: TrainingEngine) -> Losses:
    """This rank's share of the sums that the engine has the mean of."""

    def losses(batch: TokenBatch) -> tuple[float, float]:
        counted = float(batch.mask.sum())
        return engine.eval_loss(batch)["causal_lm"] * counted, counted

    return losses


def evaluation_rows(settings: EvaluateSettings, length: int, multiple: int = 1) -> int:
    """Sequences of `length` tokens that a rank evaluates at once, a multiple of `multiple`."""
    rows = max(1, min(settings.batch_size, _EVALUATED_TOKENS // length))
    return -(-rows // multiple) * multiple


def perplexities(
    texts: list[TextSource], names: list[str], losses: Losses, length: int, rows: int, sharing: Sharing,
    runtime: Runtime, vocab_size: int,
) -> Metrics:  # fmt: skip
    """{name: metrics} of each text as a whole, in windows of `length` tokens. Collective. Raises UserError for a text
    without a token to predict, or with one that the vocabulary has not."""
    found: Metrics = {}
    for text, name in zip(texts, names, strict=True):
        batches = HeldOutLoader(
            text, length=length, batch_size=rows * sharing.world, rank=sharing.rank, world=sharing.world,
            vocab_size=vocab_size,
        )  # fmt: skip
        found[name] = {**perplexity(losses, batches, sharing.reduce, text.bytes, runtime.device), "length": length}
    return found


def open_sets(
    names: list[str], spec: ModelSpec, runtime: Runtime, sharing: Sharing, cache_dir: Path | None = None,
    data: DataSettings | None = None,
) -> list[EvalSet]:  # fmt: skip
    """The evaluation sets called `names`, their rows shared out over the ranks; read as `data` says, if given."""
    options: dict[str, Any] = {}
    if data is not None:
        options = {"caption_keys": data.caption_fields or None, "caption_member": data.caption_key}
        options |= {"skip_budget": data.skip_budget, "workers": data.workers}
    transform = eval_transform(spec.config)
    with runtime.main_first():
        sources = [ShardSource.open(name, cache_dir=cache_dir) for name in names]
    return [
        EvalSet(source, transform=transform, name=name, rank=sharing.rank, world=sharing.world, **options)
        for source, name in zip(sources, names)
    ]


def run_evaluation(
    sets: list[EvalSet],
    spec: ModelSpec,
    settings: EvaluateSettings,
    encode_image: Encode,
    encode_text: Encode | None,
    sharing: Sharing,
) -> Metrics:
    """{set: metrics} of a model given by its encoders (un-normalised features). Collective."""
    return evaluate(
        encode_image,
        encode_text,
        sets,
        build_tokenizer(spec.config) if encode_text is not None else None,
        templates=settings.templates,
        batch=settings.batch_size,
        captions=RETRIEVAL_CAPTIONS if settings.retrieval else 0,
        rank=sharing.rank,
        world=sharing.world,
        reduce=sharing.reduce,
    )


def encoders(path: Path, runtime: Runtime, spec: ModelSpec | None = None) -> tuple[Encode, Encode | None]:
    """The two encoders of a checkpoint, whole on this rank's device in fp32."""
    reader = open_reader(path, spec)
    try:
        known = reader.spec
        assert known is not None
        model = build_model(
            known, dtype=torch.float32, device=runtime.device, part=ModelPart(known), groups=lone_groups()
        )
        load_canonical(model, known, lambda name: reader.read(f"weight/{name}"))
    finally:
        reader.close()
    model.eval()

    @torch.no_grad()
    def encode_image(images: torch.Tensor) -> torch.Tensor:
        return model.encode_image(images.to(runtime.device))

    @torch.no_grad()
    def encode_text(texts: torch.Tensor) -> torch.Tensor:
        return model.encode_text(texts.to(runtime.device))

    return encode_image, encode_text if "text" in known.towers else None


def language_model(path: Path, runtime: Runtime, spec: ModelSpec | None = None) -> LanguageModel:
    """The language model of a checkpoint, whole on this rank's device in fp32."""
    reader = open_reader(path, spec)
    try:
        known = reader.spec
        assert known is not None
        model = build_language_model(
            known, dtype=torch.float32, device=runtime.device, part=ModelPart(known), groups=lone_groups()
        )
        load_canonical(model, known, lambda name: reader.read(f"weight/{name}"))
    finally:
        reader.close()
    return model.eval()


def evaluate_checkpoint(
    path: str | Path, data: list[str], *, spec: ModelSpec | None = None, settings: EvaluateSettings | None = None,
    length: int | None = None,
) -> Metrics:  # fmt: skip
    """A checkpoint in any format on the sets `data`: zero-shot accuracies and retrieval recalls, or a language model's
    perplexity on windows of `length` tokens (None: as many as it has positions). Collective.

    A tokenizer.json beside the checkpoint must be that of the data. Raises UserError where data and model do not fit.
    """
    runtime = Runtime.start()
    path = Path(path)
    reader = open_reader(path, spec)
    known = reader.spec
    reader.close()
    assert known is not None
    sharing, settings = Sharing(runtime.rank, runtime.world, runtime.sum), settings or EvaluateSettings()
    if known.is_language_model:
        positions = known.towers["text"].tokens
        if length is not None and length > positions:
            raise UserError(f"--length {length}: {known.name} has {positions} positions; use at most {positions}")
        if settings.templates != EvaluateSettings().templates:
            raise UserError(f"--template: is for names of classes, {known.name} is a language model; leave it out")
        tokenizer = path / TOKENIZER if (path / TOKENIZER).is_file() else None
        with runtime.main_first():
            texts = [open_text(known, name, tokenizer) for name in data]
        losses, length = losses_of(language_model(path, runtime, known)), length or positions
        rows = evaluation_rows(settings, length)
        return perplexities(texts, data, losses, length, rows, sharing, runtime, vocabulary(known))
    if length is not None:
        raise UserError(f"--length {length}: is for language models, {known.name} is none; leave it out")
    encode_image, encode_text = encoders(path, runtime, known)
    sets = open_sets(data, known, runtime, sharing)
    return run_evaluation(sets, known, settings, encode_image, encode_text, sharing)
