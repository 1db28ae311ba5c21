"""The megatron engine: tensor x pipeline x virtual pipeline x data parallelism on megatron-core's schedules, gradient
buffers and optimizers.

A model of two towers in a pipeline: each tower is an ordinary pipeline over all stages, one after the other. They meet
only in the loss, on the last stage, by cached feature gradients: all micro-batches go forward without a graph, the loss
of all features gives each feature's gradient, and the towers go forward and backward with that gradient. A loss that is
a sum over rows needs no such detour: its micro-batches go forward and backward once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from compt_megatron.align.projection import Projections
from compt_megatron.data.batch import Batch
from compt_megatron.data.text.batch import TokenBatch
from compt_megatron.engine.cached_gradients import CachedGradients
from compt_megatron.engine.contract import AnyBatch
from compt_megatron.engine.losses import LossOf, Shares
from compt_megatron.engine.megatron_optimizer import MegatronStep
from compt_megatron.engine.megatron_state import MegatronState
from compt_megatron.engine.run_checkpoint import Held, RunCheckpoint
from compt_megatron.engine.student import (
    AnyStudent,
    Outputs,
    build_student,
    held_by,
    logit_scale_of,
    sum_sequence_gradients,
)
from compt_megatron.engine.training_step import TrainingEngine
from compt_megatron.models.clip import MAX_LOG_SCALE
from compt_megatron.models.megatron_cpu import use_cpu_in_training
from compt_megatron.models.part import ModelPart
from compt_megatron.models.stages import with_loss

_TOWERS = {"image": "vision", "text": "text"}  # feature -> the tower it comes from
_TOKENS = "tokens"  # in the place of a feature: a language model's input


class MegatronEngine(TrainingEngine):
    """One link's student under megatron-core. See `engine.contract.Engine` for what the methods promise."""

    def _build(self, projections: Projections | None) -> None:
        spec, settings, runtime = self.spec, self.settings, self.runtime
        use_cpu_in_training()
        parallel, part = self.parallel, ModelPart.current(spec)
        self._chunks: list[AnyStudent] = []
        held: dict[str, Held] = {}
        for chunk in range(part.virtual):
            student = build_student(spec, self._dtype, parallel, part, projections, chunk, self._layers.kind)
            student.to(runtime.device).train()
            sum_sequence_gradients(student, self.topology)
            held |= {f"{chunk}.{name}": entry for name, entry in held_by(student, part, chunk).items()}
            self._chunks.append(student)
        self._optimizer = MegatronStep(
            self._chunks, held, spec, settings, self.topology, self.factors, sharded=parallel.zero == 1
        )
        self.optimizer_name = self._optimizer.base.implementation
        self._state = MegatronState(self._optimizer.wrapped, self._optimizer.base, self.topology.data_group)
        self._checkpoint = RunCheckpoint([*held.values()], part, self._state, self._dtype, runtime, self.topology)

    @property
    def _last(self) -> AnyStudent:
        """The chunk that has the heads; only on the last stage."""
        return self._chunks[-1]

    # -- the model as one module -------------------------------------------------------------------------------------

    def _forward(self, batch: AnyBatch) -> Outputs:
        assert isinstance(batch, Batch)
        texts = None if batch.texts is None else batch.texts.flatten(0, 1)
        outputs: Outputs = self._last(images=batch.images.to(self._dtype), texts=texts)
        return outputs

    def _backward(self, loss: torch.Tensor) -> None:
        # megatron averages gradients over the data-parallel ranks; ours are shares of one sum
        (loss * self.topology.data).backward()

    # -- the model as pipelines --------------------------------------------------------------------------------------

    def _forward_without_graph(self, micro: Sequence[AnyBatch]) -> CachedGradients | None:
        parts: list[Outputs] = [{} for _ in micro]
        with torch.no_grad():
            for feature in _features(micro[0]):
                for outputs, value in zip(parts, self._pipeline(feature, micro), strict=self.topology.has_outputs):
                    outputs[feature] = value
        return CachedGradients(parts) if self.topology.has_outputs else None

    def _outputs_of(self, cached: CachedGradients) -> Outputs:
        """With what has no rows, and the projections: their gradients come with the loss's own backward."""
        return self._finished(cached.outputs)

    def _finished(self, features: Outputs) -> Outputs:
        outputs: Outputs = {**features, **self._last.model()}
        return outputs if self._last.projections is None else self._last.projections(outputs)

    def _backward_outputs(self, loss: torch.Tensor) -> None:
        self._backward(loss)

    def _backward_cached(self, micro: Sequence[AnyBatch], cached: CachedGradients | None) -> None:
        for feature in _features(micro[0]):

            def surrogate(index: int, output: torch.Tensor, feature: str = feature) -> torch.Tensor:
                assert cached is not None
                return cached.surrogate(index, {feature: output})

            self._pipeline(feature, micro, surrogate)

    def _backward_rows(self, micro: Sequence[AnyBatch], loss_of: LossOf, layers: Sequence[int]) -> list[Shares]:
        (feature,) = _features(micro[0])
        found: list[Shares] = []

        def loss(index: int, output: Any) -> torch.Tensor:
            share, parts = loss_of(index, self._outputs_from(feature, output))
            found.append((share.detach(), parts))
            return share * self.topology.data  # as in `_backward`

        self._pipeline(feature, micro, loss, layers, loss)
        return found

    def _forward_rows(self, micro: Sequence[AnyBatch], loss_of: LossOf, layers: Sequence[int] = ()) -> list[Shares]:
        (feature,) = _features(micro[0])
        found: list[Shares] = []

        def loss(index: int, output: Any) -> torch.Tensor:
            found.append(loss_of(index, self._outputs_from(feature, output)))
            return found[-1][0]

        for chunk in self._chunks:
            chunk.eval()
        outputs = self._pipeline(feature, micro, None, layers, loss)
        for chunk in self._chunks:
            chunk.train()
        for index, output in enumerate(outputs):
            loss(index, output)
        return found

    def _outputs_from(self, feature: str, output: Any) -> Outputs:
        """What a loss is of, from what comes out of the last stage: all of it, or a tower's feature."""
        return output if isinstance(output, dict) else self._finished({feature: output})

    def _pipeline(
        self,
        feature: str,
        micro: Sequence[AnyBatch],
        loss: Callable[[int, Any], torch.Tensor] | None = None,
        layers: Sequence[int] = (),
        inner: Callable[[int, Any], torch.Tensor] | None = None,
    ) -> list[Any]:
        """Run one tower over all micro-batches: forward, or forward and backward from `loss` (index and feature of a
        micro-batch -> 0-D). `inner`: the loss of `layers` of a language model on stages that have some and are not the
        last.

        Returns the feature of each micro-batch where it comes out and there is no backward.
        """
        from megatron.core.pipeline_parallel import get_forward_backward_func

        inputs = [_inputs(feature, batch, self._dtype) for batch in micro]
        if feature == _TOKENS:
            towers: list[Any] = [chunk.model for chunk in self._chunks]
            length = towers[0].padded(inputs[0].shape[1])
        else:
            towers = [getattr(chunk.model, _TOWERS[feature]) for chunk in self._chunks]
            length = towers[0].sequence_length
        students = dict(zip(towers, self._chunks))

        def forward(indices: Iterator[int], tower: Any) -> tuple[Any, Any]:
            index = next(indices)
            self._seed(index)

            def result(output: Any, non_loss_data: bool = False) -> Any:
                if non_loss_data:
                    return output
                assert loss is not None
                # the schedule divides by the number of micro-batches, in place
                return loss(index, output) * len(micro), {}

            if feature == _TOKENS:
                outputs = students[tower](inputs[index], layers=layers)
                if tower.post_process:
                    return outputs, result
                activations = outputs.pop("activations")
                if outputs:  # layers
                    assert inner is not None
                    activations = with_loss(activations, inner(index, outputs))
                return activations, result
            return tower(inputs[index]), result

        found = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=[iter(range(len(micro))) for _ in towers],
            model=towers,
            num_microbatches=len(micro),
            seq_length=length,
            micro_batch_size=len(inputs[0]),
            forward_only=loss is None,
            collect_non_loss_data=loss is None,
        )
        return list(found) if loss is None else []

    def _update(self, rate: float, refuse: bool = False) -> tuple[float, bool]:
        norm, refused = self._optimizer.step(rate, refuse)
        scale = logit_scale_of(self._last)
        if scale is not None:
            self._state.clamp(scale, 0.0, MAX_LOG_SCALE)
        return norm, refused

    # -- features ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def eval_features(
        self, images: torch.Tensor | None = None, texts: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Un-normalised fp32 features of this rank's rows, on every rank. Collective where the model is split."""
        for chunk in self._chunks:
            chunk.eval()
        if self.topology.pipeline == 1:
            outputs: Outputs | None = self._last(
                images=None if images is None else images.to(self.runtime.device, self._dtype),
                texts=None if texts is None else texts.to(self.runtime.device),
            )
        else:
            outputs = self._pipelined_features({"image": images, "text": texts})
        for chunk in self._chunks:
            chunk.train()
        return {key: value.float() for key, value in self._from_last(outputs).items()}

    def _pipelined_features(self, inputs: dict[str, torch.Tensor | None]) -> Outputs | None:
        count = self.topology.pipeline if self.topology.virtual > 1 else 1  # what the interleaved schedule needs
        features: Outputs = {}
        for feature, rows in inputs.items():
            if rows is None:
                continue
            wanted = len(rows)
            rows = rows.to(self.runtime.device)
            rows = torch.cat([rows, rows[:1].expand(-wanted % count, *rows.shape[1:])])
            micro = [Batch(part, part.unsqueeze(1), None, [], 0) for part in rows.chunk(count)]
            found = self._pipeline(feature, micro)
            if found:
                features[feature] = torch.cat(found)[:wanted]
        return self._finished(features) if self.topology.has_outputs else None

    def _from_last(self, outputs: Outputs | None) -> Outputs:
        """The last stage's outputs on every stage. Collective."""
        if self.topology.pipeline == 1:
            assert outputs is not None
            return outputs
        shapes = None if outputs is None else {key: tuple(value.shape) for key, value in outputs.items()}
        told: dict[str, tuple[int, ...]] = self.topology.told_by_last(shapes)
        device = self.runtime.device
        values = outputs or {key: torch.empty(shape, device=device) for key, shape in told.items()}
        return {key: self.topology.from_last(value.float()) for key, value in values.items()}

    def close(self) -> None:
        """Let go of megatron's buffers, so that the next link starts with the memory free."""
        self._chunks.clear()
        self._optimizer.close()


def _features(batch: AnyBatch) -> list[str]:
    if isinstance(batch, TokenBatch):
        return [_TOKENS]
    return ["image", "text"] if batch.texts is not None else ["image"]


def _inputs(feature: str, batch: AnyBatch, dtype: torch.dtype) -> torch.Tensor:
    if isinstance(batch, TokenBatch):
        return batch.tokens
    if feature == "image":
        return batch.images.to(dtype)
    assert batch.texts is not None
    return batch.texts.flatten(0, 1)
