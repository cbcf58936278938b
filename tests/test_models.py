"""Which files are meant: parts inside, beside and in ComfyUI's folders, told by keys and widths."""

from __future__ import annotations

from pathlib import Path

import pytest
from headers import all_in_one, clip, prefixed, t5, tokenizers, transformer, vae, write

from fluxsplit import checkpoint, models, places
from fluxsplit.errors import FluxsplitError, ModelFileMissing
from fluxsplit.fingerprint import weights_sha256
from fluxsplit.jobs import ModelFiles
from fluxsplit.models import Wanted, resolve, resolve_vae

SAMPLE = ("transformer", "t5", "clip")


@pytest.fixture(autouse=True)
def bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without ComfyUI and Hugging Face cache, and an empty working folder."""
    for name in ("HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


@pytest.fixture
def comfyui(tmp_path: Path) -> Path:
    """A ComfyUI with the usual separate files, and files of other models beside them."""
    root = tmp_path / "ComfyUI"
    write(root / "models/unet/flux1-dev-fp8.safetensors", transformer(dev=True), "F8_E4M3")
    write(root / "models/text_encoders/t5xxl_fp16.safetensors", t5(), "F16")
    write(root / "models/text_encoders/sub/t5xxl_fp8.safetensors", t5(), "F8_E4M3")
    write(root / "models/text_encoders/umt5_small.safetensors", t5(512))
    write(root / "models/clip/clip_g.safetensors", clip(1280))
    write(root / "models/clip/clip_l.safetensors", clip())
    write(root / "models/vae/ae.safetensors", vae())
    write(root / "models/vae/sd3_vae.safetensors", vae())
    write(root / "models/vae/sdxl_vae.safetensors", vae(4))
    (root / "models/vae/broken.safetensors").write_bytes(b"\0" * 100)
    (root / "comfy/text_encoders/t5_tokenizer").mkdir(parents=True)
    (root / "comfy/text_encoders/t5_tokenizer/tokenizer.json").write_text("{}")
    (root / "comfy/sd1_tokenizer").mkdir(parents=True)
    for name in ("vocab.json", "merges.txt"):
        (root / "comfy/sd1_tokenizer" / name).write_text("{}")
    return root


def names(files: ModelFiles) -> tuple[str, ...]:
    return tuple(Path(path).name for path in (files.transformer, files.text_encoder, files.clip, files.vae))


def test_no_model_is_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "DEMO_FOLDER", tmp_path / "demo")
    with pytest.raises(ModelFileMissing, match=r"demo model .* is missing"):
        resolve(Wanted(), SAMPLE)
    write(tmp_path / "demo" / "flux-demo.safetensors", all_in_one())
    files = resolve(Wanted(), SAMPLE)
    assert files.is_demo
    assert names(files) == ("flux-demo.safetensors",) * 4
    assert files.clip_tokenizer == str(tmp_path / "demo" / "tokenizers" / "clip_l")
    assert files.t5_tokenizer == str(tmp_path / "demo" / "tokenizers" / "t5xxl" / "tokenizer.json")


def test_an_all_in_one_file_holds_every_part(tmp_path: Path) -> None:
    file = write(tmp_path / "one.safetensors", all_in_one())
    tokenizers(tmp_path / "tokenizers")
    files = resolve(Wanted(model=str(file)), SAMPLE)
    assert names(files) == ("one.safetensors",) * 4
    assert not files.is_demo
    assert files.t5_tokenizer == str(tmp_path / "tokenizers/t5xxl/tokenizer.json")


def test_the_name_says_nothing(tmp_path: Path) -> None:
    """The same name exists as a transformer alone and as an all-in-one file."""
    tokenizers(tmp_path / "tokenizers")
    file = write(tmp_path / "flux1-dev-fp8.safetensors", transformer())
    write(tmp_path / "x.safetensors", t5())
    write(tmp_path / "y.safetensors", clip())
    assert names(resolve(Wanted(model=str(file)), SAMPLE)) == (file.name, "x.safetensors", "y.safetensors", "")


def test_parts_in_comfyui_by_keys_and_width(comfyui: Path) -> None:
    files = resolve(Wanted(model="flux1-dev-fp8.safetensors", comfyui=str(comfyui)), (*SAMPLE, "vae"))
    assert names(files) == (
        "flux1-dev-fp8.safetensors",
        "t5xxl_fp8.safetensors",
        "clip_l.safetensors",
        "ae.safetensors",
    )
    assert files.t5_tokenizer == str(comfyui / "comfy/text_encoders/t5_tokenizer/tokenizer.json")
    assert files.clip_tokenizer == str(comfyui / "comfy/sd1_tokenizer")


@pytest.mark.parametrize("where", ["home/ComfyUI", "work/ComfyUI"])
def test_comfyui_is_found_where_it_usually_is(comfyui: Path, tmp_path: Path, where: str) -> None:
    (tmp_path / where).parent.mkdir(exist_ok=True)
    comfyui.rename(tmp_path / where)
    assert Path(resolve_vae(Wanted())).samefile(tmp_path / where / "models/vae/ae.safetensors")


@pytest.mark.parametrize(
    "name", ["flux1-dev-fp8", "unet/../unet/flux1-dev-fp8.safetensors", "flux1-dev-fp8.safetensors"]
)
def test_names_in_comfyui(comfyui: Path, name: str) -> None:
    found = models.find_named(name.replace("unet/../unet/", ""), "transformer", comfyui)
    assert found.name == "flux1-dev-fp8.safetensors"


def test_a_comfyui_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ModelFileMissing, match=r"no ComfyUI folder"):
        resolve_vae(Wanted(comfyui=str(tmp_path)))


def test_a_model_that_is_not_there(comfyui: Path) -> None:
    with pytest.raises(ModelFileMissing) as caught:
        resolve(Wanted(model="nope.safetensors"), SAMPLE)
    assert "no such file" in caught.value.line() and "Comfy-Org/flux1-schnell" in caught.value.line()
    with pytest.raises(ModelFileMissing, match="fetches none from the hub"):
        resolve(Wanted(model="black-forest-labs/FLUX.1-schnell"), SAMPLE)
    with pytest.raises(ModelFileMissing, match=r"neither a path nor in .*models/unet"):
        resolve(Wanted(model="nope.safetensors", comfyui=str(comfyui)), SAMPLE)


def test_missing_parts_say_where_they_are_had(tmp_path: Path) -> None:
    file = write(tmp_path / "flux.safetensors", transformer())
    with pytest.raises(ModelFileMissing) as caught:
        resolve(Wanted(model=str(file)), SAMPLE)
    line = caught.value.line()
    assert "no T5 text encoder found in" in line and str(file) in line
    assert "t5xxl_fp8_e4m3fn.safetensors (4.9 GB)" in line and "--text-encoder" in line
    write(tmp_path / "t5.safetensors", t5())
    with pytest.raises(ModelFileMissing, match=r"no CLIP-L text encoder"):
        resolve(Wanted(model=str(file)), SAMPLE)
    write(tmp_path / "clip.safetensors", clip())
    with pytest.raises(ModelFileMissing, match=r"T5's tokenizer.json not found in") as caught:
        resolve(Wanted(model=str(file)), SAMPLE)
    assert "t5xxl/tokenizer.json, clip_l/vocab.json" in caught.value.line()
    with pytest.raises(ModelFileMissing, match=r"no VAE found"):
        resolve_vae(Wanted(model=str(file)))


def test_what_is_named_must_hold_the_part_and_fit(tmp_path: Path) -> None:
    file = write(tmp_path / "one.safetensors", all_in_one())
    small, lone = write(tmp_path / "small.safetensors", t5(512)), write(tmp_path / "vae.safetensors", vae())
    with pytest.raises(
        FluxsplitError, match=r"small.safetensors holds a T5 text encoder of width 512, the model takes 4096"
    ):
        resolve(Wanted(model=str(file), text_encoder=str(small)), SAMPLE)
    with pytest.raises(ModelFileMissing, match=r"vae.safetensors holds vae, but no clip"):
        resolve(Wanted(model=str(file), clip=str(lone)), SAMPLE)
    with pytest.raises(ModelFileMissing, match=r"no such file"):
        resolve(Wanted(model=str(file), clip="gone.safetensors"), SAMPLE)
    with pytest.raises(FluxsplitError, match=r"width 4"):
        resolve_vae(Wanted(vae=str(write(tmp_path / "sd.safetensors", vae(4)))))


def test_one_text_encoder_file_may_hold_both(tmp_path: Path) -> None:
    model = write(tmp_path / "a/flux.safetensors", transformer())
    both = write(tmp_path / "b/text.safetensors", prefixed(t5=t5(), clip=clip()))
    tokenizers(tmp_path / "a/tokenizers")
    files = resolve(Wanted(model=str(model), text_encoder=str(both)), SAMPLE)
    assert names(files)[1:3] == ("text.safetensors", "text.safetensors")


def test_a_conditioning_needs_neither_encoders_nor_tokenizers(tmp_path: Path) -> None:
    file = write(tmp_path / "flux.safetensors", transformer())
    assert resolve(Wanted(model=str(file)), ("transformer",)) == ModelFiles(str(file))


def test_a_folder_of_two_transformers_names_both(tmp_path: Path) -> None:
    for name in ("dev.safetensors", "schnell.safetensors"):
        write(tmp_path / name, transformer())
    with pytest.raises(FluxsplitError, match=r"two files with a transformer: dev.* and schnell"):
        checkpoint.part(tmp_path, "transformer")


def test_rivals_are_for_the_person_to_decide(tmp_path: Path) -> None:
    write(tmp_path / "v/one.safetensors", vae())
    write(tmp_path / "v/two.safetensors", vae())
    model = write(tmp_path / "v/flux.safetensors", transformer())
    with pytest.raises(ModelFileMissing, match=r"2 files hold a VAE: .*one.safetensors, .*two.safetensors"):
        resolve_vae(Wanted(model=str(model)))
    assert resolve_vae(Wanted(model=str(model), vae=str(tmp_path / "v/two.safetensors"))).endswith("two.safetensors")


def test_hidden_files_are_no_weights(tmp_path: Path, comfyui: Path) -> None:
    write(tmp_path / "model" / "flux.safetensors", transformer())
    for folder in (tmp_path / "model", comfyui / "models/unet"):
        (folder / "._flux.safetensors").write_bytes(b"\0\5\x16\7")
    assert Path(checkpoint.part(tmp_path / "model", "transformer").path).name == "flux.safetensors"
    assert [file.name for file in places.weight_files(comfyui / "models/unet")] == ["flux1-dev-fp8.safetensors"]
    hashed = weights_sha256(tmp_path / "model")
    (tmp_path / "model" / "._flux.safetensors").unlink()
    assert weights_sha256(tmp_path / "model") == hashed


def test_a_diffusers_folder(tmp_path: Path) -> None:
    root = tmp_path / "FLUX.1-schnell"
    whole = {
        "transformer_blocks.0.attn.norm_added_k.weight": (32,),
        "x_embedder.weight": (64, 64),
        "context_embedder.weight": (64, 4096),
        "time_text_embed.text_embedder.linear_1.weight": (64, 768),
    }
    write(root / "transformer/a-00001-of-00002.safetensors", dict(list(whole.items())[:2]))
    write(root / "transformer/a-00002-of-00002.safetensors", dict(list(whole.items())[2:]))
    write(root / "text_encoder/model.safetensors", clip())
    write(root / "text_encoder_2/model.safetensors", t5())
    write(root / "vae/diffusion_pytorch_model.safetensors", vae())
    (root / "model_index.json").write_text("{}")
    for name in ("tokenizer_2/tokenizer.json", "tokenizer/vocab.json", "tokenizer/merges.txt"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("{}")
    files = resolve(Wanted(model=str(root)), (*SAMPLE, "vae"))
    assert names(files) == ("FLUX.1-schnell",) * 4
    assert files.t5_tokenizer == str(root / "tokenizer_2/tokenizer.json")
    assert files.clip_tokenizer == str(root / "tokenizer")
    inside = resolve(Wanted(model=str(root / "transformer")), (*SAMPLE, "vae"))
    assert names(inside) == ("transformer", "FLUX.1-schnell", "FLUX.1-schnell", "FLUX.1-schnell")


def test_tokenizers_in_the_hugging_face_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = tmp_path / "hf/hub"
    flux = hub / "models--black-forest-labs--FLUX.1-dev/snapshots/abc"
    openai = hub / "models--openai--clip-vit-large-patch14/snapshots/def"
    for file in (flux / "tokenizer_2/tokenizer.json", openai / "vocab.json", openai / "merges.txt"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    assert models.find_tokenizers("", None, None) == (str(flux / "tokenizer_2/tokenizer.json"), str(openai))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(ModelFileMissing):
        models.find_tokenizers("", None, None)


def test_named_tokenizers_are_not_looked_for_elsewhere(tmp_path: Path, comfyui: Path) -> None:
    folder = tokenizers(tmp_path / "mine")
    assert models.find_tokenizers(str(folder), None, comfyui)[1] == str(folder / "clip_l")
    (folder / "clip_l/merges.txt").unlink()
    with pytest.raises(ModelFileMissing, match=r"CLIP's vocab.json and merges.txt not found in"):
        models.find_tokenizers(str(folder), None, comfyui)


def test_extra_model_paths(comfyui: Path, tmp_path: Path) -> None:
    write(tmp_path / "elsewhere/models/vaes/ae.safetensors", vae())
    write(tmp_path / "a/t5.safetensors", t5())
    (comfyui / "models/vae/ae.safetensors").unlink()
    (comfyui / "models/vae/sd3_vae.safetensors").unlink()
    (comfyui / "extra_model_paths.yaml").write_text(f"""
# a comment
a111:
    base_path: {tmp_path}/elsewhere/  # where it is
    is_default: true
    vae: "models/vaes"
    loras: |
        models/Lora
        models/LyCORIS

comfyui:
    text_encoders: |
         {tmp_path}/a/
         {tmp_path}/b/
""")
    found = places.extra_model_paths(comfyui / "extra_model_paths.yaml")
    assert found["loras"] == [tmp_path / "elsewhere/models/Lora", tmp_path / "elsewhere/models/LyCORIS"]
    assert found["text_encoders"] == [tmp_path / "a", tmp_path / "b"]
    assert "is_default" not in found
    assert resolve_vae(Wanted(comfyui=str(comfyui))) == str(tmp_path / "elsewhere/models/vaes/ae.safetensors")


@pytest.mark.parametrize("text", ["", "\t\t:\n", "- a\n- b", "a: {b: c}", "x:\n  - y\n", ":", "a\n b\n", "\0\xff"])
def test_odd_yaml_is_passed_over(tmp_path: Path, text: str) -> None:
    (tmp_path / "extra_model_paths.yaml").write_text(text, encoding="latin-1")
    assert isinstance(places.extra_model_paths(tmp_path / "extra_model_paths.yaml"), dict)


def test_links_in_circles_end(tmp_path: Path) -> None:
    write(tmp_path / "m/a.safetensors", vae())
    (tmp_path / "m/loop").symlink_to(tmp_path / "m", target_is_directory=True)
    assert len(list(places.weight_files(tmp_path / "m"))) <= places.MAX_DEPTH + 1
