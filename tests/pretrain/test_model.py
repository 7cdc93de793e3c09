"""The decoder as a whole: what one token may depend on, names, tying, recomputation, agreement with transformers."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pretrain.model
from data_pipeline.errors import UserError
from data_pipeline.settings import build_settings
from pretrain.model import Decoder, ModelSettings, initialize_
from pretrain.model.linear.kinds.dense import DenseLinear

VOCAB = 61
SHAPE = {"hidden_size": 32, "layers": 2, "heads": 4, "kv_heads": 2, "intermediate_size": 48}


def decoder(activation_checkpointing: str = "none", **changes: object) -> Decoder:
    model = Decoder(ModelSettings(**{**SHAPE, "init_std": 0.2, **changes}), VOCAB, activation_checkpointing)
    initialize_(model, 7)
    return model


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def packed(*lengths: int) -> tuple[Tensor, Tensor]:
    """Positions and document ids [1, T] of documents of these lengths, one after another."""
    positions = torch.cat([torch.arange(length) for length in lengths])
    documents = torch.cat([torch.full((length,), index) for index, length in enumerate(lengths)])
    return positions[None], documents[None]


# 700 spans more than one of the key blocks that torch's CPU kernel walks through, the first of them masked throughout
@pytest.mark.parametrize("lengths", [(5, 9), (600, 100)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_documents_do_not_see_each_other(lengths: tuple[int, int], dtype: torch.dtype) -> None:
    model = decoder(qk_norm=True).to(dtype)
    positions, documents = packed(*lengths)
    first = tokens(1, sum(lengths))
    second = first.clone()
    second[:, : lengths[0]] = (first[:, : lengths[0]] + 1) % VOCAB
    logits, changed = (model(t, positions, documents, False) for t in (first, second))
    assert torch.equal(logits[:, lengths[0] :], changed[:, lengths[0] :])
    assert not torch.equal(logits[:, : lengths[0]], changed[:, : lengths[0]])
    assert logits.isfinite().all()


@torch.no_grad()
def test_a_packed_document_has_the_logits_it_has_alone() -> None:
    model = decoder()
    positions, documents = packed(5, 9, 3)
    batch = tokens(1, 17)
    together = model(batch, positions, documents, False)
    for start, length in ((0, 5), (5, 9), (14, 3)):
        alone = model(batch[:, start : start + length], *packed(length), True)
        torch.testing.assert_close(together[:, start : start + length], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("single_document", [True, False])
@torch.no_grad()
def test_no_token_sees_a_later_one(single_document: bool) -> None:
    model = decoder()
    positions, documents = packed(12)
    before = tokens(1, 12)
    after = before.clone()
    after[0, 7] = (after[0, 7] + 1) % VOCAB
    logits, changed = (model(t, positions, documents, single_document) for t in (before, after))
    assert torch.equal(logits[:, :7], changed[:, :7])
    assert not (logits[:, 7:] == changed[:, 7:]).all(dim=-1).any()


@torch.no_grad()
def test_single_document_equals_the_masked_path() -> None:
    model = decoder()
    positions, documents = packed(12)
    batch = tokens(1, 12)
    masked, causal = (model(batch, positions, documents, single) for single in (False, True))
    torch.testing.assert_close(masked, causal, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_recomputed_activations_give_the_same_gradient_bits(tied: bool) -> None:
    positions, documents = packed(5, 7)
    batch = tokens(2, 12)
    gradients = []
    for mode in ("none", "full"):
        model = decoder(mode, tied_embeddings=tied)
        calls = []
        model.blocks[0].feed_forward.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        logits = model(batch, positions.expand(2, -1), documents.expand(2, -1), False)
        F.cross_entropy(logits.flatten(0, 1), batch.flatten()).backward()
        assert len(calls) == {"none": 1, "full": 2}[mode]
        with torch.no_grad():
            model(batch[:1], positions, documents, False)
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert len(gradients[0]) == len(gradients[1])
    for kept, recomputed in zip(*gradients, strict=True):
        assert torch.equal(kept, recomputed)


def test_names_of_the_parameters() -> None:
    assert [name for name, _ in decoder(layers=1, qk_norm=True).named_parameters()] == [
        "embedding.weight",
        "blocks.0.attention_norm.weight",
        "blocks.0.attention.query.weight",
        "blocks.0.attention.key.weight",
        "blocks.0.attention.value.weight",
        "blocks.0.attention.output.weight",
        "blocks.0.attention.query_norm.weight",
        "blocks.0.attention.key_norm.weight",
        "blocks.0.feed_forward_norm.weight",
        "blocks.0.feed_forward.gate.weight",
        "blocks.0.feed_forward.up.weight",
        "blocks.0.feed_forward.down.weight",
        "norm.weight",
        "head.weight",
    ]


def test_a_tied_head_is_the_embedding_also_after_materialising() -> None:
    with torch.device("meta"):
        model = Decoder(ModelSettings(**SHAPE, tied_embeddings=True), VOCAB)
    model.to_empty(device="cpu")
    initialize_(model, 7)
    assert model.head.weight is model.embedding.weight
    assert [name for name, _ in model.named_parameters() if "head" in name] == []
    model.double()
    assert model.head.weight is model.embedding.weight


def test_every_linear_layer_is_made_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, nn.Module] = {}

    def record(in_features: int, out_features: int, name: str, settings: ModelSettings) -> nn.Module:
        made[name] = pretrain.model.linear.make_linear(in_features, out_features, name, settings)
        return made[name]

    for room in ("attention", "feed_forward", "decoder"):
        monkeypatch.setattr(f"pretrain.model.{room}.make_linear", record)
    model = decoder()
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert list(found) == list(made)
    assert all(found[name] is module and isinstance(module, DenseLinear) for name, module in made.items())
    assert len(made) == 2 * 7 + 1
    assert all(module.bias is None for module in found.values())


def test_no_other_file_of_the_model_multiplies_by_a_weight() -> None:
    """A matrix product or a layer of torch's elsewhere would escape the choice of a parameterization."""
    products = {"Linear", "linear", "matmul", "mm", "bmm", "einsum", "addmm", "baddbmm"}
    for path in Path(pretrain.model.__path__[0]).glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        used = {node.attr for node in nodes if isinstance(node, ast.Attribute)} & products
        # the first product of a factorised layer, which `recompute.py` makes for those layers so that it can keep it
        assert used == ({"linear", "matmul", "mm"} if path.name == "recompute.py" else set()), path.name
        assert not any(isinstance(node, ast.MatMult) for node in nodes), path.name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hidden_size": 30},
            "model: hidden_size 30 is not a multiple of heads 4; change one of them or give head_dim",
        ),
        ({"kv_heads": 3}, "model: heads 4 is not a multiple of kv_heads 3"),
        ({"hidden_size": 12}, "model: head_dim 3 is odd, but the rotary embedding rotates pairs of features"),
        ({"head_dim": 5}, "model: head_dim 5 is odd"),
        ({"dropout": 0.1}, "unknown key 'dropout' (value 0.1); known here: experts, head_dim, heads, hidden_size"),
        ({"rope_theta": 0.0}, "'rope_theta' = 0.0: input should be greater than 1"),
        ({"layers": 0}, "'layers' = 0: input should be greater than or equal to 1"),
    ],
)
def test_impossible_shapes_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as refusal:
        build_settings(ModelSettings, {**SHAPE, **changes}, "model")
    assert message in str(refusal.value)


def test_vocabulary_comes_from_the_tokenizer_and_may_be_rounded_up() -> None:
    assert ModelSettings(**SHAPE).resolve_vocab_size(1000) == 1000
    assert ModelSettings(**SHAPE, vocab_size=1024).resolve_vocab_size(1000) == 1024
    with pytest.raises(UserError, match=r"model\.vocab_size is 999, but the data's tokenizer has 1000 tokens\. Leave"):
        ModelSettings(**SHAPE, vocab_size=999).resolve_vocab_size(1000)


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_logits_equal_transformers_llama(tied: bool) -> None:
    transformers = pytest.importorskip("transformers")
    model = decoder(tied_embeddings=tied, rope_theta=500.0, norm_eps=1e-3)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-3,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    renamed = {"head.weight": "lm_head.weight", "norm.weight": "model.norm.weight"}
    inner = {
        "embedding": "embed_tokens",
        "blocks": "layers",
        "attention_norm": "input_layernorm",
        "feed_forward_norm": "post_attention_layernorm",
        "attention": "self_attn",
        "feed_forward": "mlp",
        "query": "q_proj",
        "key": "k_proj",
        "value": "v_proj",
        "output": "o_proj",
        "gate": "gate_proj",
        "up": "up_proj",
        "down": "down_proj",
    }

    def their_name(name: str) -> str:
        return renamed.get(name) or ".".join(["model", *(inner.get(part, part) for part in name.split("."))])

    result = theirs.load_state_dict({their_name(n): value for n, value in model.state_dict().items()}, strict=False)
    assert result.unexpected_keys == []
    assert result.missing_keys == []
    batch = tokens(3, 20)
    positions, documents = packed(20)
    ours = model(batch, positions.expand(3, -1), documents.expand(3, -1), True)
    torch.testing.assert_close(ours, theirs(batch).logits, rtol=0, atol=1e-5)
    assert ours.abs().max() > 1
