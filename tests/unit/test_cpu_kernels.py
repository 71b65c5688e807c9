"""Each kernel against the same thing in float64, at sizes that fill a vector and sizes that do not."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch

from server.kernels import library
from server.kernels.ops import Kernels, Packed, Products, kernels_for
from server.lora.weights import LoraPair

CPU = torch.device("cpu")


def linear(kernels: Kernels, x: torch.Tensor, packed: Packed) -> torch.Tensor:
    return kernels.linears(x, Products([packed]))[0]


TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.2e-2}  # of the largest value


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    found = kernels_for(request.param, CPU)
    assert found is not None, "the kernels do not compile here"
    torch.manual_seed(0)
    return found


def assert_near(found: torch.Tensor, wanted: torch.Tensor, size: torch.Tensor | None = None) -> None:
    """`size`: what the sums would be if nothing in them cancelled; the same as `wanted` if not given."""
    most = float((wanted if size is None else size).abs().max()) * TOLERANCE[found.dtype]
    assert float((found.double() - wanted).abs().max()) <= most


@pytest.mark.parametrize(("outs", "ins"), [(48, 32), (49, 6), (1, 2), (192, 1100), (100, 2050)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear(kernels: Kernels, outs: int, ins: int, bias: bool) -> None:
    weight = torch.randn(outs, ins).to(kernels.dtype)
    shift = torch.randn(outs).to(kernels.dtype) if bias else None
    packed = kernels.pack(weight, shift)
    assert packed is not None
    assert torch.equal(kernels.unpack(packed), weight)
    for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 23, 64, 65, 130):
        x = torch.randn(rows, ins).to(kernels.dtype)
        wanted = x.double() @ weight.double().t() + (0 if shift is None else shift.double())
        assert_near(linear(kernels, x, packed), wanted)


def test_a_row_does_not_depend_on_the_others(kernels: Kernels) -> None:
    """To the bit: an answer is the same whoever shares the batch, and a NaN stays in its row."""
    packed = kernels.pack(torch.randn(200, 576).to(kernels.dtype), None)
    assert packed is not None
    x = torch.randn(70, 576).to(kernels.dtype)
    whole = linear(kernels, x, packed)
    for rows in (1, 3, 8, 13, 64):
        assert torch.equal(linear(kernels, x[:rows], packed), whole[:rows])
    x[5] = torch.nan
    dirty = linear(kernels, x, packed)
    assert dirty[5].isnan().all()
    keep = [at for at in range(70) if at != 5]
    assert torch.equal(dirty[keep], whole[keep])


def test_what_does_not_fit_whole_words_is_not_packed() -> None:
    narrow = kernels_for(torch.bfloat16, CPU)
    assert narrow is not None
    assert narrow.pack(torch.zeros(4, 7, dtype=torch.bfloat16), None) is None
    assert kernels_for(torch.float16, CPU) is None
    assert kernels_for(torch.float32, torch.device("meta")) is None


def tables_of(pairs: list[list[LoraPair | None]]) -> list[torch.Tensor]:
    """One address table an adapter."""
    entries = [[(p.a.data_ptr(), p.b.data_ptr(), len(p.a)) if p else (0, 0, 0) for p in one] for one in pairs]
    return [torch.tensor(one, dtype=torch.long) for one in entries]


def packed_of(kernels: Kernels, weight: torch.Tensor) -> Packed:
    found = kernels.pack(weight.to(kernels.dtype), None)
    assert found is not None
    return found


@pytest.mark.parametrize(("ins", "outs"), [(576, 1536), (64, 24), (38, 51), (6, 7), (600, 48)])
def test_lora_mixes_ranks_modules_and_the_base(kernels: Kernels, ins: int, outs: int) -> None:
    ranks = [[1, 0], [4, 8], [7, 3], [64, 16], [0, 5]]
    pairs = [
        [
            LoraPair(torch.randn(r, ins).to(kernels.dtype), torch.randn(r, outs).to(kernels.dtype)) if r else None
            for r in one
        ]
        for one in ranks
    ]
    tables = tables_of(pairs)
    packed = packed_of(kernels, torch.randn(outs, ins))
    weight = kernels.unpack(packed).double()
    for owners in ([0], [-1, 2, 2, 2, 2, 2, -1, 3], [4] * 40, [0, 1, 2, 3, 4] * 5, [1] * 9 + [-1] * 3 + [3] * 70):
        x = torch.randn(len(owners), ins).to(kernels.dtype)
        plain = linear(kernels, x, packed)
        addresses = torch.tensor([tables[owner].data_ptr() if owner >= 0 else 0 for owner in owners])
        for module in (0, 1):
            products = Products([packed], [module])
            (out,) = kernels.linears(x, products, addresses)
            for at, owner in enumerate(owners):
                pair = pairs[owner][module] if owner >= 0 else None
                if pair is None:
                    assert torch.equal(out[at], plain[at]), "a token without this module is not touched"
                    continue
                a, b = pair.a.double(), pair.b.double()
                base = x[at].double() @ weight.t()
                size = base.abs() + (x[at].double().abs() @ a.abs().t()) @ b.abs()
                assert_near(out[at], base + (x[at].double() @ a.t()) @ b, size)
                (alone,) = kernels.linears(x[at : at + 1], products, addresses[at : at + 1].clone())
                assert torch.equal(alone[0], out[at]), "a token's result does not depend on the others"


def test_lora_of_rows_that_lie_apart(kernels: Kernels) -> None:
    """An input that is part of a wider product."""
    pair = LoraPair(torch.randn(4, 32).to(kernels.dtype), torch.randn(4, 48).to(kernels.dtype))
    (table,) = tables_of([[pair]])
    products = Products([packed_of(kernels, torch.zeros(48, 32))], [0])
    x = torch.randn(6, 96).to(kernels.dtype)[:, 32:64]
    (y,) = kernels.linears(x, products, torch.tensor([table.data_ptr()] * 6))
    assert_near(y, (x.double() @ pair.a.double().t()) @ pair.b.double())


def test_another_number_format_is_refused(kernels: Kernels) -> None:
    """It would be read as numbers that it does not hold."""
    other = torch.bfloat16 if kernels.dtype == torch.float32 else torch.float32
    x, y = torch.zeros(2, 32, dtype=kernels.dtype), torch.zeros(2, 32, dtype=other)
    packed = kernels.pack(torch.zeros(48, 32, dtype=kernels.dtype), None)
    assert packed is not None
    assert kernels.pack(torch.zeros(48, 32, dtype=other), None) is None
    pool, slots = torch.zeros(1, 32, 16, dtype=kernels.dtype), torch.zeros(2, dtype=torch.long)
    for call in (
        lambda: linear(kernels, y, packed),
        lambda: kernels.rope(x.view(2, 2, 16), x.view(2, 2, 16), y[:, :16], y[:, :16]),
        lambda: kernels.store_kv(y.view(1, 4, 16), y.view(1, 4, 16), pool, pool, slots),
    ):
        with pytest.raises(TypeError, match="the kernels are for"):
            call()
    turned = torch.zeros(1, 16, 2, dtype=kernels.dtype).transpose(1, 2)
    with pytest.raises(TypeError, match="next to each other"):
        kernels.store_kv(turned, turned, pool, pool, slots)


def test_loras_nan_stays_in_its_row(kernels: Kernels) -> None:
    bad, good = (
        LoraPair(torch.full((4, 64), value).to(kernels.dtype), torch.ones(4, 64).to(kernels.dtype))
        for value in (torch.nan, 1.0)
    )
    tables = tables_of([[bad], [good]])
    products, x = Products([packed_of(kernels, torch.zeros(64, 64))], [0]), torch.ones(12, 64).to(kernels.dtype)
    addresses = torch.tensor([tables[at % 3 == 0].data_ptr() if at % 3 < 2 else 0 for at in range(12)])
    (y,) = kernels.linears(x, products, addresses)
    assert y[1::3].isnan().all()
    assert y[0::3].eq(256).all()
    assert y[2::3].eq(0).all()


def test_the_time_of_products_and_of_adapters_is_counted(kernels: Kernels) -> None:
    pair = LoraPair(torch.randn(8, 64).to(kernels.dtype), torch.randn(8, 64).to(kernels.dtype))
    (table,) = tables_of([[pair]])
    products, x = Products([packed_of(kernels, torch.zeros(64, 64))], [0]), torch.ones(12, 64).to(kernels.dtype)
    kernels.linears(x, products)
    products_alone, adapters_alone = kernels.spent[0], kernels.spent[1]
    assert products_alone > 0
    kernels.linears(x, products, torch.tensor([table.data_ptr()] * 12))
    assert kernels.spent[0] > products_alone
    assert kernels.spent[1] > adapters_alone


@pytest.mark.parametrize("dim", [16, 576, 75, 5])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(kernels: Kernels, dim: int, offset: float) -> None:
    x, weight = (torch.randn(7, dim) * 3).to(kernels.dtype), torch.randn(dim).to(kernels.dtype)
    wanted = x.double() * (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * (weight.double() + offset)
    assert_near(kernels.rms_norm(x, weight, 1e-5, offset), wanted)


def test_silu_mul(kernels: Kernels) -> None:
    gate = torch.cat((torch.linspace(-200, 200, 10_001), torch.tensor([0.0, -0.0, 1e30, -1e30]))).to(kernels.dtype)
    up = torch.randn(len(gate)).to(kernels.dtype)
    wanted = torch.nn.functional.silu(gate.double()) * up.double()
    found = kernels.silu_mul(gate.clone(), up)
    assert torch.allclose(found.double(), wanted, rtol=TOLERANCE[kernels.dtype], atol=1e-30)
    gate[3] = torch.nan
    assert kernels.silu_mul(gate, up)[3].isnan()


@pytest.mark.parametrize("inner", [70, 98, 5])
def test_silu_mul_of_a_row_does_not_depend_on_the_others(kernels: Kernels, inner: int) -> None:
    """Also where a row ends within a vector."""
    gate, up = (torch.randn(9, inner).mul(6).to(kernels.dtype) for _ in range(2))
    whole = kernels.silu_mul(gate.clone(), up)
    for rows in (1, 2, 5):
        assert torch.equal(kernels.silu_mul(gate[:rows].clone(), up[:rows]), whole[:rows])


@pytest.mark.parametrize(("dim", "rotary"), [(64, 64), (80, 32), (10, 6)])
def test_rope(kernels: Kernels, dim: int, rotary: int) -> None:
    query, key = torch.randn(5, 6, dim).to(kernels.dtype), torch.randn(5, 2, dim).to(kernels.dtype)
    angles = torch.rand(5, rotary) * 6
    cosine, sine = angles.cos().to(kernels.dtype), angles.sin().to(kernels.dtype)

    def wanted(x: torch.Tensor) -> torch.Tensor:
        turned, rest = x.double()[..., :rotary], x.double()[..., rotary:]
        half = torch.cat((-turned[..., rotary // 2 :], turned[..., : rotary // 2]), -1)
        return torch.cat((turned * cosine.double()[:, None] + half * sine.double()[:, None], rest), -1)

    expected = wanted(query), wanted(key)
    kernels.rope(query, key, cosine, sine)
    assert_near(query, expected[0])
    assert_near(key, expected[1])


def test_without_a_compiler_there_are_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert library.library.__wrapped__("float") is None
    assert "there is no g++" in caplog.text


def test_a_compiler_that_fails_is_said_once_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert library.library.__wrapped__("no_such_type") is None
    assert "steps take longer" in caplog.text
    assert list((tmp_path / "onebase").iterdir()) == []


def test_products_and_targets_of_one_input_are_those_of_each(kernels: Kernels) -> None:
    """Sizes that end within a panel, with and without bias; an adapter that has only one of the modules."""
    weights = [torch.randn(outs, 64).to(kernels.dtype) for outs in (100, 48, 7)]
    packed = [kernels.pack(w, torch.randn(len(w)).to(kernels.dtype) if len(w) == 48 else None) for w in weights]
    together = [one for one in packed if one is not None]
    x = torch.randn(70, 64).to(kernels.dtype)
    found = kernels.linears(x, Products(together))
    for one, y in zip(together, found, strict=True):
        assert torch.equal(y, linear(kernels, x, one))
    pair = LoraPair(torch.randn(4, 64).to(kernels.dtype), torch.randn(4, 48).to(kernels.dtype))
    [table] = tables_of([[None, pair, None]])
    tables = torch.tensor([table.data_ptr(), 0] * 35)
    adapted = kernels.linears(x, Products(together, [0, 1, 2]), tables)
    alone = [kernels.linears(x, Products([one], [at]), tables)[0] for at, one in enumerate(together)]
    assert all(torch.equal(a, b) for a, b in zip(adapted, alone, strict=True))
    assert torch.equal(adapted[0], found[0])
    assert not torch.equal(adapted[1], found[1])


def test_a_cache_that_others_can_write_to_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever can write there could have this process run their code."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "onebase").mkdir()
    (tmp_path / "onebase").chmod(0o777)
    with caplog.at_level(logging.WARNING):
        assert library.library.__wrapped__("float") is None
    assert "others can write" in caplog.text


def test_a_user_without_a_home_is_served_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(library.Path, "home", homeless)
    with caplog.at_level(logging.WARNING):
        assert library.library.__wrapped__("float") is None
    assert "home directory" in caplog.text


@pytest.mark.parametrize("left", [0, 100, 20_000, -1])
def test_a_library_that_was_cut_short_is_made_anew(left: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Loading a part of one would kill the process. What is there whole needs no compiler."""
    content = library._compiled("float").read_bytes()  # compiling takes seconds: it is done once, for all tests
    monkeypatch.setattr(library.subprocess, "run", lambda command, **_: Path(command[-1]).write_bytes(content))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = library._compiled("float")
    made.unlink()
    made.write_bytes(content[:left])
    assert library._compiled("float") == made
    assert made.read_bytes() == content
    monkeypatch.setenv("PATH", str(tmp_path))
    assert library._compiled("float") == made


def test_the_libraries_that_were_used_last_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each with its digest; those of another number format are not touched."""

    def compiled(value: str, fingerprint: int) -> Path:
        monkeypatch.setattr(library, "_fingerprint", lambda: str(fingerprint))
        made = library._compiled(value)
        os.utime(made, (fingerprint, fingerprint))  # used one after the other, long ago
        return made

    def compiler(command: list[str], **_: object) -> None:
        Path(command[-1]).write_text("compiled")

    def left() -> set[str]:
        return {path.name for path in (tmp_path / "onebase").iterdir()}

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(library.shutil, "which", lambda name: name)
    monkeypatch.setattr(library.subprocess, "run", compiler)
    other = compiled("bfloat16", 1)
    made = [compiled("float", at) for at in range(2, 6)]
    used = made[0]
    monkeypatch.setattr(library, "_fingerprint", lambda: "2")
    assert library._compiled("float") == used
    assert used.stat().st_mtime > 5, "it is noted that it was used"
    new = compiled("float", 6)
    stay = [other, used, *made[2:], new]
    assert left() == {path.name for one in stay for path in (one, one.with_suffix(".sha256"))}
