"""Squared gradients at linears' outputs and attention products against autograd's own, and the losses they are of."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from llm_fp4.calibration import Part, loss_of, output_gradients
from llm_fp4.integrations.attention import use_quantized_attention
from llm_fp4.models import find_structure


def roberta() -> Any:
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.RobertaConfig(**sizes, initializer_range=0.2, max_position_embeddings=64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.RobertaForSequenceClassification(config).eval()


def parts_of(model: Any, batches: list[dict[str, Tensor]]) -> list[Part]:
    generator = torch.Generator().manual_seed(0)
    return [
        Part(partial(loss_of, model, b, generator), b.get("attention_mask"), b.get("attention_mask"), i, 0, len(b["input_ids"]))
        for i, b in enumerate(batches)
    ]


def gradients(model: Any, batches: list[dict[str, Tensor]], share: int = 1) -> dict[str, Tensor]:
    structure = find_structure(model)
    names = [*structure.outer_linears, *(n for names in structure.linears.values() for n in names)]
    stacks = [[n for b in blocks for n in structure.linears[b]] for blocks in structure.stacks.values()]
    linears = {n: model.get_submodule(n) for n in names}
    return output_gradients(model, linears, stacks, parts_of(model, batches), share, lambda done: None)


def batch(padded: bool) -> dict[str, Tensor]:
    ids = torch.randint(3, 90, (4, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 7:] = 0
        mask[3, 2:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1, 1, 0])}


@pytest.mark.parametrize("padded", [False, True])
def test_means_of_squared_gradients_are_those_of_a_plain_backward_pass(padded: bool) -> None:
    model, inputs = roberta(), batch(padded)
    found = gradients(model, [inputs])
    for name in ("roberta.encoder.layer.0.attention.self.query", "roberta.encoder.layer.1.output.dense"):
        seen: list[Tensor] = []
        handle = model.get_submodule(name).register_forward_hook(
            lambda m, a, out, seen=seen: (out.retain_grad(), seen.append(out))[1]
        )
        model(**inputs).loss.mul(4).backward()
        handle.remove()
        assert seen[0].grad is not None
        squares = seen[0].grad[inputs["attention_mask"].bool()].square()
        torch.testing.assert_close(found[f"{name}.tokens"], squares.mean(1), rtol=1e-3, atol=1e-12)
        torch.testing.assert_close(found[f"{name}.outputs"], squares.mean(0), rtol=1e-3, atol=1e-12)


def test_parameters_get_no_gradient_and_keep_their_wish_for_one() -> None:
    model = roberta()
    gradients(model, [batch(False)])
    assert all(p.grad is None for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_gradients_of_products_are_kept_of_the_sequences_the_search_samples() -> None:
    model = roberta()
    use_quantized_attention(model)
    found = gradients(model, [batch(False), batch(True)], share=2)
    name = "roberta.encoder.layer.0.attention.self"
    assert {k for k in found if k.startswith(f"{name}.0.")} == {f"{name}.0.{b}.{i}" for b in (0, 1) for i in (0, 2)}
    assert found[f"{name}.0.0.0"].shape == (4, 12, 12)
    assert found[f"{name}.1.1.2"].shape == (4, 12, 8)


class Answer:
    """What a model returned."""

    def __init__(self, **fields: Tensor) -> None:
        self.__dict__.update(fields)


class Writer(nn.Module):
    def can_generate(self) -> bool:
        return True

    def forward(self, logits: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Answer:
        return Answer(logits=logits)


def test_a_model_that_writes_is_judged_by_the_next_tokens_without_padding() -> None:
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    ids, mask = torch.tensor([[1, 2, 3, 4, 5], [6, 5, 4, 0, 0]]), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    loss = loss_of(Writer(), {"logits": logits, "input_ids": ids, "attention_mask": mask}, torch.Generator())
    chances = logits.log_softmax(-1)
    expected = -sum(chances[0, t, ids[0, t + 1]] for t in range(4)) - sum(chances[1, t, ids[1, t + 1]] for t in range(2))
    torch.testing.assert_close(loss, expected)


def test_own_labels_are_drawn_from_the_models_own_probabilities() -> None:
    class Judge(nn.Module):
        def forward(self, logits: Tensor) -> Answer:
            return Answer(logits=logits)

    probabilities = torch.tensor([0.7, 0.2, 0.1])
    logits = probabilities.log().repeat(4000, 1).requires_grad_()
    loss_of(Judge(), {"logits": logits}, torch.Generator().manual_seed(0)).backward()
    assert logits.grad is not None
    drawn = (probabilities - logits.grad).mean(0)  # each gradient is the probabilities less the label drawn
    torch.testing.assert_close(drawn, probabilities, atol=0.03, rtol=0)


def test_without_logits_the_first_output_counts_and_padding_does_not() -> None:
    class Encoder(nn.Module):
        def forward(self, hidden: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
            return {"last_hidden_state": hidden * 2.0, "pooler_output": hidden[:, 0]}

    hidden = torch.randn(2, 300, 4).requires_grad_()
    mask = torch.ones(2, 300, dtype=torch.long)
    mask[1, 100:] = 0
    loss_of(Encoder(), {"hidden": hidden, "attention_mask": mask}, torch.Generator().manual_seed(0)).backward()
    assert hidden.grad is not None
    assert float(hidden.grad[1, 100:].abs().max()) == 0
    assert float(hidden.grad[0].square().mean()) == pytest.approx(4.0, rel=0.15)  # (d output / d hidden)², the noise's variance 1
