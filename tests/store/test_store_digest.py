"""Everything that decides an answer is in a store's digest: what changed is refused, or counts as it is now."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import xxhash
from stores import make_store

from qmix.errors import StoreError
from qmix.evaluate.results import Results, identity
from qmix.store.manifest import EDITABLE, file_digest, sealed
from qmix.store.opened import RESTORE, WITHOUT, open_store, put_profile
from qmix.store.profile import Profile

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="module")
def made(tiny: Path, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("made")
    checkpoint = shutil.copytree(tiny, directory / "m", ignore=shutil.ignore_patterns("recipe"))
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": 2}')
    return make_store(checkpoint, directory / "s").directory


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    """A copy to change; its large files are shared."""
    (tmp_path / "s").mkdir()
    for path in made.iterdir():
        if path.suffix == ".safetensors":
            (tmp_path / "s" / path.name).hardlink_to(path)
        else:
            shutil.copyfile(path, tmp_path / "s" / path.name)
    return tmp_path / "s"


def refusal(store: Path) -> str:
    with pytest.raises(StoreError) as caught:
        open_store(store)
    return str(caught.value)


def still_opens(store: Path) -> bool:
    with suppress(StoreError):
        open_store(store)
        return True
    return False


def swapped(path: Path) -> None:
    """Change a word of a vocabulary, or a setting; the file stays valid."""
    text = path.read_text()
    first, second = ('"the"', '"The"') if '"the"' in text else ("false", "true")
    assert first in text
    path.write_text(text.replace(first, second, 1))


def test_the_manifest_knows_every_small_file(made: Path) -> None:
    store = open_store(made)
    assert store.small_files.keys() == {"config.json", *TOKENIZER, *EDITABLE}
    assert store.parts == {"weights": store.parts["weights"], **store.small_files}
    assert len(store.digest) == 64
    assert open_store(made).digest == store.digest


@pytest.mark.parametrize("name", TOKENIZER)
def test_a_tokenizer_that_changed_is_refused(store: Path, name: str) -> None:
    swapped(store / name)
    assert refusal(store) == f"{store / name}: changed since the store was made; {RESTORE}"
    (store / name).unlink()
    assert refusal(store) == f"{store / name}: missing; {RESTORE}"


def test_a_tokenizer_file_that_came_later_is_refused(store: Path) -> None:
    (store / "added_tokens.json").write_text('{"<x>": 5}')
    assert refusal(store) == f"{store / 'added_tokens.json'}: was not there when the store was made; delete it"


def test_a_store_that_was_made_without_a_tokenizer_may_be_given_one(store: Path, tiny: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(tiny, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*", "*.jinja"))
    made = make_store(bare, tmp_path / "without")
    for name in TOKENIZER:
        shutil.copyfile(store / name, made.directory / name)
    assert open_store(made.directory).digest != made.digest


@pytest.mark.parametrize("name", EDITABLE)
def test_what_people_adapt_counts_as_it_is_now(store: Path, name: str) -> None:
    before = open_store(store)
    original = (store / name).read_text()
    (store / name).write_text(original + " ")
    edited = open_store(store)
    (store / name).unlink()
    without = open_store(store)
    assert len({before.digest, edited.digest, without.digest}) == 3
    assert edited.small_files == before.small_files
    differing = {part for part in edited.parts if edited.parts[part] != before.parts[part]}
    assert differing == {name}
    (store / name).write_text(original)
    assert open_store(store).digest == before.digest


def test_every_flipped_bit_of_the_manifest_is_found(store: Path) -> None:
    """One bit of every seventh byte; where the content is what it was (another space), nothing needs to be found."""
    path = store / "qmix.json"
    raw, content = path.read_bytes(), json.loads(path.read_text())
    opened = 0
    for position in range(0, len(raw), 7):
        damaged = bytearray(raw)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        if still_opens(store):
            assert json.loads(path.read_text()) == content
            opened += 1
    assert opened < len(raw) / 7 / 4


def test_a_profile_with_a_digit_that_changed_is_refused(store: Path) -> None:
    geometry = open_store(store).geometry
    share = geometry.experts_per_token / geometry.num_experts
    use = tuple((share,) * geometry.num_experts for _ in range(geometry.num_layers))
    without = open_store(store).digest
    put_profile(store, Profile("tiny", None, use))
    assert open_store(store).use == use
    assert open_store(store).digest == without
    path = store / "profile.json"
    path.write_text(path.read_text().replace(str(share), str(share + 0.001), 1))
    assert refusal(store) == f"{path}: damaged, or changed since it was put there; {WITHOUT}"


def test_a_store_of_the_first_format_opens_and_its_config_is_checked(store: Path) -> None:
    path = store / "qmix.json"
    content = json.loads(path.read_text())
    del content["digest"], content["checksums"]["files"]
    config = store / "config.json"
    content["checksums"]["config"] = xxhash.xxh3_64_hexdigest(config.read_bytes())
    path.write_text(json.dumps(content | {"format_version": 1}))
    before = open_store(store)
    assert before.small_files == {}
    swapped(store / "tokenizer.json")
    assert open_store(store).digest != before.digest
    config.write_text(config.read_text() + " ")
    assert refusal(store) == f"{config}: changed since the store was made; {RESTORE}"


def edited_tokenizer(store: Path) -> None:
    """Another vocabulary, taken into the manifest: as in a store that was made with it."""
    swapped(store / "tokenizer.json")
    manifest = json.loads((store / "qmix.json").read_text())
    manifest["checksums"]["files"]["tokenizer.json"] = file_digest((store / "tokenizer.json").read_bytes())
    (store / "qmix.json").write_text(json.dumps(sealed(manifest)))


def edited_template(store: Path) -> None:
    path = store / "chat_template.jinja"
    path.write_text(path.read_text() + " ")


def edited_defaults(store: Path) -> None:
    (store / "generation_config.json").write_text('{"eos_token_id": 2, "temperature": 0.5}')


EDITS = {
    "tokenizer.json": edited_tokenizer,
    "chat_template.jinja": edited_template,
    "generation_config.json": edited_defaults,
}


@pytest.mark.parametrize(
    "name", ["tokenizer.json", *(pytest.param(name, marks=pytest.mark.slow) for name in list(EDITS)[1:])]
)
def test_a_batch_does_not_go_on_with_another_store(qmix, store: Path, tmp_path: Path, name: str) -> None:
    lines = [json.dumps({"id": f"{index}", "prompt": f"Open the {index}", "max_tokens": 3}) for index in range(3)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    argv = ("batch", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", "-m", store, "--ram", "1GiB")
    assert qmix(*argv).status == 0
    answers = (tmp_path / "out.jsonl").read_bytes()
    (tmp_path / "out.jsonl").write_bytes(b"".join(answers.splitlines(keepends=True)[:2]))
    original = {path.name: path.read_bytes() for path in store.glob("*.j*")}
    EDITS[name](store)
    refused = qmix(*argv)
    assert refused.status == 2
    assert f"has answers from another run (another {name}); use the options of that run" in refused.lines[-1]
    (store / name).unlink()
    if name in EDITABLE:
        assert f"another run (now without {name}); use" in qmix(*argv).lines[-1]
    for each, content in original.items():
        (store / each).write_bytes(content)
    assert qmix(*argv).status == 0
    assert (tmp_path / "out.jsonl").read_bytes().count(b"\n") == 3


@pytest.mark.parametrize("name", EDITS)
def test_a_chat_takes_the_texts_and_says_what_differs(qmix, store: Path, tmp_path: Path, name: str) -> None:
    chat = ("chat", store, "--ram", "1GiB", "--max-new-tokens", "4", "--temperature", "0")
    saved = tmp_path / "s.json"
    assert qmix(*chat, stdin=f"Hello there\n/save {saved} --cache\n".encode()).status == 0
    EDITS[name](store)
    done = qmix(*chat, "--resume", saved, stdin=b"More\n")
    assert done.status == 0
    assert f"saved with m with other {name}; only its texts are used, and the next turn computes them again" in done.err


@pytest.mark.parametrize("name", EDITS)
def test_kept_results_of_an_evaluation_are_those_of_one_store(store: Path, tmp_path: Path, name: str) -> None:
    before = identity(open_store(store), "here")
    with Results(tmp_path / "out", before) as results:
        key = results.key(b"request")
        results.add({key: [0.5]})
    EDITS[name](store)
    with Results(tmp_path / "out", identity(open_store(store), "here")) as results:
        assert results.get(results.key(b"request")) is None
        assert results.get(key) == [0.5]


def test_kept_results_of_an_evaluation_are_those_of_one_kind_of_processor(store: Path) -> None:
    opened = open_store(store)
    assert identity(opened, "CPU (avx2)") != identity(opened, "GPU, CPU (avx2)") != identity(opened, "CPU (avx512)")
