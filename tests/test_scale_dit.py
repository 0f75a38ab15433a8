"""Scale-DiT: one low-resolution pass and local steps against both images in one sequence; adapters; the variants."""

import itertools

import pytest
import torch
from peft import LoraConfig

from hires.additions.adapters import adapter_switched
from hires.attention import Guidance, low_resolution_pass, use_attention
from hires.attention.flux import image_ids
from hires.attention.scale_dit import low_resolution_radius
from hires.backbones import Backbone
from hires.backbones.flux import pack
from hires.cascade import cascade
from hires.errors import HiresError
from hires.models import HINTS, build_pipeline
from hires.settings import Sampling
from hires.variants import VARIANTS, Variant

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "norm1.linear", "norm.linear", "proj_mlp", "proj_out"]
FAST = Sampling(num_inference_steps=3, tau=500, local_radius=2)
PROMPTS = ["two red discs on sand", "a blue star"]


def with_adapter(model, name="scale-dit", seed=0, targets=TARGETS):
    """A LoRA whose product isn't zero."""
    torch.manual_seed(seed)
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False), name)
    return model


@pytest.fixture
def pipe():
    torch.manual_seed(0)
    return build_pipeline("tiny-flux")


def rotated(x, ids, axes=(8, 12, 12), theta=10_000.0):
    """RoPE written with complex numbers: x (batch, tokens, heads, head_dim), ids (tokens, 3)."""
    angles = []
    for axis, width in enumerate(axes):
        frequency = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        angles.append(ids[:, axis, None].double() * frequency)
    turn = torch.polar(torch.ones(()).double(), torch.cat(angles, -1))[:, None]
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2)


def sees(grid, low_grid, text, radius=None, window=None, neighbours="row"):
    """Boolean (queries, keys) over [text, image, low-resolution image], place by place from the method's words."""
    reach = 2 * radius if radius else window
    side = [max(1, reach * low // high) for high, low in zip(grid, low_grid)]
    far = max(1, (radius if radius else window // 2) * max(low_grid) // max(grid))
    places = list(itertools.product(*map(range, grid)))
    low_places = list(itertools.product(*map(range, low_grid)))
    kinds = [("text", None)] * text + [("image", p) for p in places] + [("low", p) for p in low_places]

    def one(query, key):
        (kind, q), (other, k) = query, key
        if kind == "low":
            return other == "low" and all(abs(a - b) <= far for a, b in zip(q, k))
        if kind == "text" or other == "text":
            return other != "low"
        if other == "image":
            if radius:
                return all(abs(a - b) <= radius for a, b in zip(q, k))
            return all(a // window == b // window for a, b in zip(q, k))
        own = [a * low // high // s for a, high, low, s in zip(q, grid, low_grid, side)]
        apart = [abs(b // s - o) for b, s, o in zip(k, side, own)]
        return apart[0] <= (neighbours == "all") and apart[1] <= 1

    return torch.tensor([[one(q, k) for k in kinds] for q in kinds])


def joint(model, image, low, text, pooled, t, guidance, grid, low_grid, mask, scaled=True):
    """Velocity of the image with [text, image, low-resolution image] in one sequence: two time embeddings, the LoRA
    in the layers that the low-resolution tokens go through, one softmax under one mask."""
    heads, n_text, n_image = model.config.num_attention_heads, text.shape[1], image.shape[1]

    def time(value, strength):
        ones = torch.ones(len(image)).double()
        return model.time_text_embed(value * ones * 1000, strength * ones * 1000, pooled)

    now, clean = time(t, guidance), time(0.0, 1.0)
    rows, cols = torch.meshgrid(*(torch.arange(s) for s in grid), indexing="ij")
    ids = torch.stack([torch.zeros_like(rows), rows, cols], -1).flatten(0, 1).double()
    s = [high / small if scaled else 1.0 for high, small in zip(grid, low_grid)]
    low_ids = torch.tensor([[0.0, s[0] * i, s[1] * j] for i in range(low_grid[0]) for j in range(low_grid[1])])
    all_ids = torch.cat([torch.zeros(n_text, 3), ids, low_ids.double()])

    def lora(on):
        return adapter_switched(model, "scale-dit", on)

    def heads_of(x):
        return x.unflatten(-1, (heads, -1))

    def attend(query, key, value):
        query, key, value = (x.transpose(1, 2) for x in (rotated(query, all_ids), rotated(key, all_ids), value))
        scores = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).masked_fill(~mask, float("-inf"))
        return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)

    def projected(attn, x):
        return attn.norm_q(heads_of(attn.to_q(x))), attn.norm_k(heads_of(attn.to_k(x))), heads_of(attn.to_v(x))

    with lora(False):
        image, text = model.x_embedder(image), model.context_embedder(text)
    with lora(True):
        low = model.x_embedder(low)
    for block in model.transformer_blocks:
        attn, normed, triples = block.attn, [], []
        for x, norm, emb, on in ((image, block.norm1, now, False), (low, block.norm1, clean, True)):
            with lora(on):
                normed.append(norm(x, emb=emb))
                triples.append(projected(attn, normed[-1][0]))
        text_normed = block.norm1_context(text, emb=now)
        with lora(False):
            added = [heads_of(f(text_normed[0])) for f in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)]
            added = [attn.norm_added_q(added[0]), attn.norm_added_k(added[1]), added[2]]
        out = attend(*(torch.cat([a, b, c], 1) for a, b, c in zip(added, *triples)))
        out_text, out_image, out_low = out.split([n_text, n_image, low.shape[1]], 1)

        def update(x, out, parts, norm, ff):
            _, gate, shift, scale, gate_mlp = parts
            x = x + gate[:, None] * out
            return x + gate_mlp[:, None] * ff(norm(x) * (1 + scale[:, None]) + shift[:, None])

        with lora(False):
            image = update(image, attn.to_out[0](out_image), normed[0], block.norm2, block.ff)
            text = update(text, attn.to_add_out(out_text), text_normed, block.norm2_context, block.ff_context)
        with lora(True):
            low = update(low, attn.to_out[0](out_low), normed[1], block.norm2, block.ff)
    image = torch.cat([text, image], 1)
    for block in model.single_transformer_blocks:
        parts = []
        for x, emb, on in ((image, now, False), (low, clean, True)):
            with lora(on):
                normed, gate = block.norm(x, emb=emb)
                parts.append((projected(block.attn, normed), block.act_mlp(block.proj_mlp(normed)), gate))
        out = attend(*(torch.cat([a, b], 1) for a, b in zip(parts[0][0], parts[1][0])))
        outs = out.split([image.shape[1], low.shape[1]], 1)
        with lora(False):
            image = image + parts[0][2][:, None] * block.proj_out(torch.cat([outs[0], parts[0][1]], 2))
        with lora(True):
            low = low + parts[1][2][:, None] * block.proj_out(torch.cat([outs[1], parts[1][1]], 2))
    with lora(False):
        return model.proj_out(model.norm_out(image[:, n_text:], now))


@pytest.mark.parametrize(
    "grid, low_grid, form",
    [
        ((8, 12), (2, 3), {"radius": 2}),
        ((8, 8), (4, 4), {"radius": 3}),
        ((8, 12), (4, 6), {"window": 4}),
        ((12, 8), (3, 2), {"radius": 4, "guidance_neighbours": "all", "order": "window"}),
        ((8, 12), (2, 3), {"radius": 2, "scaled": False}),
    ],
    ids=str,
)
@torch.no_grad()
def test_cached_keys_are_those_of_the_joint_sequence(pipe, grid, low_grid, form):
    model = with_adapter(pipe.transformer).double()
    form = dict(form)
    scaled = form.pop("scaled", True)
    torch.manual_seed(1)
    image, low = torch.randn(2, grid[0] * grid[1], 64).double(), torch.randn(2, low_grid[0] * low_grid[1], 64).double()
    text, pooled = torch.randn(2, 5, 128).double(), torch.randn(2, 128).double()
    size, low_size = ((2 * h, 2 * w) for h, w in (grid, low_grid))
    order = form.pop("order", "hilbert")
    neighbours = form.pop("guidance_neighbours", "row")
    with adapter_switched(model, "scale-dit", True):
        guidance = low_resolution_pass(
            model, low, pooled, low_size=low_size, size=size, scaled=scaled, order=order, **form
        )
    ids = image_ids(grid, torch.device("cpu"))
    with (
        adapter_switched(model, "scale-dit", False),
        use_attention(
            model, "scale_dit", size, low_size, guidance=guidance, order=order, **form, guidance_neighbours=neighbours
        ),
    ):
        got = model(
            hidden_states=image, encoder_hidden_states=text, pooled_projections=pooled,
            timestep=torch.full((2,), 0.7).double(), guidance=torch.full((2,), 3.0).double(),
            img_ids=ids, txt_ids=torch.zeros(5, 3), return_dict=False,
        )[0]  # fmt: skip
    mask = sees(grid, low_grid, 5, **form, neighbours=neighbours)
    expected = joint(model, image, low, text, pooled, 0.7, 3.0, grid, low_grid, mask, scaled)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)
    blind = mask.clone()
    blind[: -low.shape[1], -low.shape[1] :] = False
    without = joint(model, image, low, text, pooled, 0.7, 3.0, grid, low_grid, blind, scaled)
    assert (without - expected).abs().max() > 1e-3  # the test would see missing keys


def test_low_resolution_reach_follows_the_ratio():
    assert low_resolution_radius(8, None, (256, 256), (64, 64)) == 2
    assert low_resolution_radius(2, None, (32, 32), (8, 8)) == 1  # at least 1
    assert low_resolution_radius(None, 16, (64, 64), (32, 32)) == 4  # a window counts as twice its radius
    with pytest.raises(HiresError, match="radius 8 and window 16: scale_dit needs one of the two"):
        low_resolution_radius(8, 16, (64, 64), (32, 32))
    ids = image_ids((2, 3), torch.device("cpu"), (8, 12))
    assert ids.tolist() == [[0, 4.0 * i, 4.0 * j] for i in range(2) for j in range(3)]


@torch.no_grad()
def test_a_window_replaces_the_radius_in_both_passes(pipe):
    backbone = Backbone.from_pipeline(pipe, "tiny-flux", HINTS["tiny-flux"])
    torch.manual_seed(1)
    latents, pooled = torch.randn(2, 16, 16, 16), torch.randn(2, 128)
    sampling = Sampling(local_radius=2, local_window=8).over(backbone.defaults)
    given = backbone.low_resolution_guidance(latents, (32, 32), {"pooled_prompt_embeds": pooled}, sampling)
    wide, narrow = (
        low_resolution_pass(pipe.transformer, pack(latents), pooled, low_size=(16, 16), size=(32, 32), **reach)
        for reach in ({"window": 8}, {"radius": 2})
    )
    assert torch.equal(given.layers[-1][0], wide.layers[-1][0])
    assert not torch.equal(given.layers[-1][0], narrow.layers[-1][0])


# --- adapters -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_an_adapter_is_switched_alone_and_comes_back(pipe):
    """The user's own LoRA stays on; after an exception too the model is what it was."""
    model = pipe.transformer
    inputs = {
        "hidden_states": torch.randn(1, 64, 64), "encoder_hidden_states": torch.randn(1, 4, 128),
        "pooled_projections": torch.randn(1, 128), "timestep": torch.rand(1), "guidance": torch.ones(1),
        "img_ids": image_ids((8, 8), torch.device("cpu")), "txt_ids": torch.zeros(4, 3),
        "return_dict": False,
    }  # fmt: skip
    plain = model(**inputs)[0]
    with adapter_switched(model, "scale-dit", True):  # nothing is loaded: nothing changes
        assert torch.equal(model(**inputs)[0], plain)
    with_adapter(model, "style", 1)
    style = model(**inputs)[0]
    with_adapter(model, "scale-dit", 2)
    model.set_adapter(["style", "scale-dit"])
    both = model(**inputs)[0]
    with pytest.raises(ZeroDivisionError), adapter_switched(model, "scale-dit", False):
        assert torch.equal(model(**inputs)[0], style)
        1 / 0  # noqa: B018
    assert torch.equal(model(**inputs)[0], both)
    model.disable_adapters()
    wants = [p.requires_grad for p in model.parameters()]
    with adapter_switched(model, "scale-dit", True):
        only = model(**inputs)[0]
    assert torch.equal(model(**inputs)[0], plain)
    assert [p.requires_grad for p in model.parameters()] == wants
    assert len({x.sum().item() for x in (plain, style, both, only)}) == 4


# --- the cascade ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A model folder with an adapter beside it, as hires promote leaves it."""
    folder = tmp_path_factory.mktemp("model") / "tiny-flux"
    pipe = build_pipeline("tiny-flux")
    pipe.save_pretrained(folder)
    with_adapter(pipe.transformer, targets=TARGETS[:4])
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(pipe.transformer, adapter_name="scale-dit")
    pipe.save_lora_weights(folder / "adapters" / "scale-dit", transformer_lora_layers=state)
    loaded = type(pipe).from_pretrained(folder)
    return Backbone.from_pipeline(loaded, "tiny-flux", HINTS["tiny-flux"])


def last(backbone, variant, sampling=FAST, height=256, width=384, **options):
    *_, stage = cascade(backbone, PROMPTS, [0, 1], variant, height, width, sampling, **options)
    return stage.latents


def test_the_base_is_the_same_with_and_without_an_adapter(backbone):
    plain = next(cascade(backbone, PROMPTS, [0, 1], VARIANTS["npa"], 256, 384, FAST)).latents
    guided = next(cascade(backbone, PROMPTS, [0, 1], VARIANTS["scale-dit"], 256, 384, FAST)).latents
    assert torch.equal(plain, guided)  # the adapter was loaded from the model's folder, and is off
    again = next(cascade(backbone, PROMPTS, [0, 1], VARIANTS["npa"], 256, 384, FAST)).latents
    assert torch.equal(plain, again)


def test_the_picture_of_a_stages_input_is_decoded_once(pipe):
    """Latent Frequency Mixing and the low-resolution pass look at the same picture."""
    backbone = Backbone.from_pipeline(pipe, "tiny-flux", HINTS["tiny-flux"])
    with_adapter(pipe.transformer)
    decoded = []
    pipe.vae.decoder.register_forward_hook(lambda module, args, output: decoded.append(output.shape[2]))
    list(cascade(backbone, PROMPTS[:1], [0], VARIANTS["hybrid"], 256, 256, FAST))
    assert decoded == [128]


@pytest.mark.parametrize("name", ["scale-dit", "hybrid"])
def test_stages_see_an_image_of_a_quarter_of_their_side(backbone, name):
    seen, given = [], backbone.low_resolution_guidance

    def watched(latents, size, *rest):
        seen.append((tuple(latents.shape[2:]), size))
        return given(latents, size, *rest)

    backbone.low_resolution_guidance = watched
    try:
        stages = list(cascade(backbone, PROMPTS, [0, 1], VARIANTS[name], 512, 512, FAST))
    finally:
        del backbone.low_resolution_guidance
    expected = {"scale-dit": [((16, 16), (64, 64))], "hybrid": [((8, 8), (32, 32)), ((16, 16), (64, 64))]}[name]
    assert seen == expected
    assert all(stage.latents.isfinite().all() for stage in stages)


def test_a_low_resolution_image_of_the_bases_size_is_its_latents(backbone):
    """At ratio 2 the base of a 256x384 target is the guide itself: no round trip through the VAE."""
    decoded, decode = [], backbone.decode
    backbone.decode = lambda *args: decoded.append(args) or decode(*args)
    try:
        last(
            backbone,
            Variant(attention="scale_dit", adapter="scale-dit"),
            Sampling(lr_ratio=2, reference="latent").over(FAST),
        )
    finally:
        del backbone.decode
    assert not decoded


@pytest.mark.parametrize(
    "setting",
    [
        {"local_radius": 1}, {"local_window": 4}, {"lr_keys": False}, {"lr_adapter": False}, {"lr_anchors": False},
        {"lr_neighbours": "all"}, {"lr_ratio": 2}, {"stage_guidance_scale": 4.0}, {"stage_shift": 2.0},
    ],
    ids=str,
)  # fmt: skip
def test_every_setting_acts(backbone, setting):
    base = next(cascade(backbone, PROMPTS, [0, 1], VARIANTS["scale-dit"], 256, 384, FAST)).latents
    plain = last(backbone, VARIANTS["scale-dit"], base=base)
    changed = last(backbone, VARIANTS["scale-dit"], Sampling(**setting).over(FAST), base=base)
    assert (plain - changed).abs().max() > 1e-5


def test_order_and_batch_change_nothing_but_rounding(backbone):
    plain = last(backbone, VARIANTS["scale-dit"])
    for order in ("morton", "window", "raster"):
        ordered = last(backbone, VARIANTS["scale-dit"], Sampling(token_order=order).over(FAST))
        torch.testing.assert_close(plain, ordered, atol=1e-4, rtol=1e-4)
    *_, alone = cascade(backbone, PROMPTS[1:], [1], VARIANTS["scale-dit"], 256, 384, FAST)
    torch.testing.assert_close(plain[1:], alone.latents, atol=1e-4, rtol=1e-4)


def test_scale_dit_keeps_a_users_lora(backbone):
    """A style LoRA acts on both passes; the variant's own adapter only on the small image."""
    model = backbone.model
    before = last(backbone, VARIANTS["scale-dit"])
    with_adapter(model, "style", 3)
    try:
        model.set_adapter(["style"])
        styled = last(backbone, VARIANTS["scale-dit"])
        assert model.active_adapters() == ["style"]
        assert (styled - before).abs().max() > 1e-3
    finally:
        model.delete_adapters("style")


def test_loading_the_adapter_leaves_a_users_lora_on(backbone):
    """The first image of a pipeline loads the adapter from its folder; peft alone would turn the style off."""
    fresh = type(backbone.pipe).from_pretrained(backbone.pipe.name_or_path)
    with_adapter(fresh.transformer, "style", 3)
    styled = Backbone.from_pipeline(fresh, "tiny-flux", HINTS["tiny-flux"])
    before = next(cascade(styled, PROMPTS, [0, 1], VARIANTS["npa"], 256, 384, FAST)).latents
    after = next(cascade(styled, PROMPTS, [0, 1], VARIANTS["scale-dit"], 256, 384, FAST)).latents
    assert set(fresh.transformer.peft_config) == {"style", "scale-dit"}
    assert torch.equal(before, after)
    assert fresh.transformer.active_adapters() == ["style"]


def test_its_adapter_is_off_in_every_other_variant(backbone):
    """As load_lora_weights leaves it on."""
    plain = last(backbone, VARIANTS["npa"])
    last(backbone, VARIANTS["scale-dit"])
    backbone.model.set_adapter(["scale-dit"])
    backbone.model.enable_adapters()
    try:
        assert torch.equal(last(backbone, VARIANTS["npa"]), plain)
        assert backbone.model.active_adapters() == ["scale-dit"]
    finally:
        backbone.model.disable_adapters()


def test_a_fused_lora_is_told(pipe):
    with_adapter(pipe.transformer, "style", 1)
    with_adapter(pipe.transformer, "scale-dit", 2)
    pipe.transformer.fuse_lora(adapter_names=["style"])
    with pytest.raises(HiresError, match="unfuse_lora"), adapter_switched(pipe.transformer, "scale-dit", True):
        pass


def test_refusals_of_scale_dit(backbone, pipe):
    sdxl = Backbone.from_pipeline(build_pipeline("tiny-sdxl"), "tiny-sdxl", HINTS["tiny-sdxl"])
    bare = Backbone.from_pipeline(pipe, "tiny-flux", HINTS["tiny-flux"])
    local = Variant(attention="scale_dit")
    guidance = Guidance((2, 2), [])
    cases = [
        (
            lambda: last(sdxl, VARIANTS["scale-dit"], Sampling(num_inference_steps=3)),
            "scale_dit stands in for FLUX's stock and IP-Adapter processors",
        ),
        (lambda: last(sdxl, local, Sampling(lr_ratio=2)), "lr_ratio = 2.0 means nothing to a sdxl model"),
        (lambda: last(bare, VARIANTS["scale-dit"]), "pipe.load_lora_weights"),
        (lambda: last(backbone, local, Sampling(lr_ratio=3).over(FAST)), "sides must be even"),
        (lambda: use_attention(pipe.transformer, "scale_dit", (16, 16), (4, 4)).__enter__(), "needs one of the two"),
        (
            lambda: use_attention(
                pipe.transformer, "scale_dit", (16, 16), (4, 4), radius=2, order="hilber"
            ).__enter__(),
            "did you mean 'hilbert'",
        ),
        (
            lambda: use_attention(
                pipe.transformer, "scale_dit", (16, 16), (4, 4), radius=2, guidance=guidance
            ).__enter__(),
            "guidance of 0 layers: this model has 7",
        ),
    ]
    for call, message in cases:
        with pytest.raises(HiresError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
