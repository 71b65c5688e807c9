"""`/adapters`: upload and its refusals, history, paging, and changes while requests are in flight."""

import contextlib
import errno
import json
import pickle
import shutil
import socket
import threading

import httpx
import pytest
from safetensors.torch import load_file, save

from server.registry.store import Store
from tests.adapters import container, entries_of
from tests.families import adapter_bytes, config_of
from tests.serving import Server, refused, until

INFO = {
    "name": str,
    "version": int,
    "digest": str,
    "rank": int,
    "alpha": float,
    "targets": list,
    "parameters": int,
    "bytes": int,
    "kind": str,
    "base": str,
    "created": float,
}
STATUS = {"own", "public", "residency", "lane", "lane_note", "pinned", "in_flight", "last_used", "requests"}
CAP = 200_000


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("allowed")
    return {"max_upload_bytes": CAP, "max_rank": 32, "adapter_sources": (f"file://{folder}/",)}


@pytest.fixture
def parts(adapters):
    """Config and weights of a good adapter."""
    return dict(zip(("config", "weights"), adapter_bytes(adapters[0]), strict=True))


def digest_of(server, name="a"):
    return server.http.get(f"/adapters/{name}").json()["digest"]


# --- upload -----------------------------------------------------------------------------------------------------------


def test_a_new_adapter_is_201_with_the_contracts_fields(server, adapters):
    response = server.put("fields", adapters[1])
    body = response.json()
    assert response.status_code == 201
    assert {field: type(value) for field, value in body.items()} == INFO
    assert (body["name"], body["version"], body["rank"], body["alpha"]) == ("fields", 1, 8, 16)
    assert body["kind"] == "lora"
    assert body["base"] == "tiny-llama"
    assert body["digest"].startswith("sha256:")
    assert response.headers["etag"] == f'"{body["digest"]}"'
    assert body["targets"] == sorted(body["targets"])
    assert body["parameters"] == sum(t.numel() for t in load_file(adapters[1] / "adapter_model.safetensors").values())


def test_the_same_bytes_again_are_the_same_version(server, adapters):
    first, again = server.put("same", adapters[0]), server.put("same", adapters[0])
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json() == again.json()
    assert first.headers["etag"] == again.headers["etag"]


def test_other_bytes_are_the_next_version(server, adapters):
    versions = [server.put("next", folder).json() for folder in adapters]
    assert [one["version"] for one in versions] == [1, 2, 3]
    assert len({one["digest"] for one in versions}) == 3
    assert server.http.get("/adapters/next").json()["digest"] == versions[2]["digest"]
    history = server.http.get("/adapters/next/versions").json()
    assert history["next"] is None
    assert [one["current"] for one in history["data"]] == [False, False, True]
    assert [{field: one[field] for field in INFO} for one in history["data"]] == versions


def test_one_digest_for_the_same_bytes_under_two_names(server, adapters):
    assert server.put("twin-a", adapters[0]).json()["digest"] == server.put("twin-b", adapters[0]).json()["digest"]
    assert server.http.delete("/adapters/twin-a").status_code == 204
    assert server.generate(adapter="twin-b")["adapter"]["name"] == "twin-b"


def test_a_condition_that_does_not_hold_changes_nothing(server, adapters):
    first = server.put("guard", adapters[0], headers={"If-None-Match": "*"})
    assert first.status_code == 201
    etag = first.headers["etag"]
    for headers in ({"If-None-Match": "*"}, {"If-Match": '"sha256:other"'}, {"If-Match": f"W/{etag}"}):
        assert refused(server.put("guard", adapters[1], headers=headers), 412)["code"] == "precondition_failed"
    refused(server.put("guard", adapters[1], headers={"If-Match": "unquoted"}), 422, "if-match")
    refused(server.put("missing", adapters[1], headers={"If-Match": "*"}), 412)
    refused(server.http.delete("/adapters/guard", headers={"If-Match": '"sha256:other"'}), 412)
    assert digest_of(server, "guard") == first.json()["digest"]
    second = server.put("guard", adapters[1], headers={"If-Match": f'"x", {etag}'})
    assert (second.status_code, second.json()["version"]) == (200, 2)
    rollback = {"url": "/adapters/guard/rollback", "json": {"version": 1}}
    refused(server.http.post(**rollback, headers={"If-Match": etag}), 412)
    assert server.http.post(**rollback, headers={"If-Match": second.headers["etag"]}).status_code == 200
    assert server.http.delete("/adapters/guard", headers={"If-Match": etag}).status_code == 204


def test_roll_back_serves_the_old_weights_and_a_new_put_counts_on(server, adapters):
    one, two = (server.put("back", folder).json() for folder in adapters[:2])
    old = server.http.post("/adapters/back/rollback", json={"version": 1})
    assert (old.status_code, old.json(), old.headers["etag"]) == (200, one, f'"{one["digest"]}"')
    used = server.generate(adapter="back")["adapter"]
    assert (used["version"], used["digest"]) == (1, one["digest"])
    assert server.put("back", adapters[2]).json()["version"] == 3
    assert server.http.post("/adapters/back/rollback", json={"version": 2}).json() == two
    assert refused(server.http.post("/adapters/back/rollback", json={"version": 9}), 404)["param"] == "version"
    for body in ({}, {"version": 0}, {"version": "1"}, {"version": 1, "x": 1}):
        refused(server.http.post("/adapters/back/rollback", json=body), 422)


def test_delete_forgets_the_name(server, adapters):
    server.put("gone", adapters[0])
    deleted = server.http.delete("/adapters/gone")
    assert (deleted.status_code, deleted.content) == (204, b"")
    assert deleted.headers["x-request-id"]
    for response in (
        server.http.get("/adapters/gone"),
        server.http.delete("/adapters/gone"),
        server.http.get("/adapters/gone/versions"),
        server.http.post("/adapters/gone/rollback", json={"version": 1}),
        server.http.post("/v1/generate", json={"prompt": "a", "adapter": "gone"}),
    ):
        assert refused(response, 404)["code"] == "adapter_not_found"


def test_show_tells_where_an_adapter_is(server, new_adapter):
    put = server.put("where", new_adapter()).json()
    response = server.http.get("/adapters/where")
    body = response.json()
    assert set(body) == set(INFO) | STATUS
    assert {field: body[field] for field in INFO} == put
    assert response.headers["etag"] == f'"{put["digest"]}"'
    assert body["residency"] == "disk"
    assert (body["lane"], body["pinned"], body["in_flight"], body["requests"]) == ("shared", False, 0, 0)
    server.generate(adapter="where")
    until(lambda: server.http.get("/adapters/where").json()["residency"] == "device")


def test_the_list_comes_in_pages_by_name(server, adapters):
    for name in ("p-1", "p-2", "p-3", "p-4", "p-5"):
        server.put(name, adapters[0])
    everything = server.http.get("/adapters").json()
    names = [one["name"] for one in everything["data"]]
    assert names == sorted(names)
    assert everything["next"] is None
    assert set(everything["data"][0]) == set(INFO) | STATUS
    paged, after = [], None
    while True:
        page = server.http.get("/adapters", params={"limit": 2} | ({"after": after} if after else {})).json()
        assert len(page["data"]) <= 2
        paged += page["data"]
        after = page["next"]
        if after is None:
            break
    assert paged == everything["data"]
    assert server.http.get("/adapters", params={"after": "zzz"}).json() == {"data": [], "next": None}
    for query in ({"limit": 0}, {"limit": 1001}, {"limit": "x"}):
        refused(server.http.get("/adapters", params=query), 422, "limit")
    refused(server.http.get("/adapters", params={"after": "a" * 65}), 422, "after")


@pytest.mark.parametrize("name", ["UPPER", "-a", ".a", "a b", "a" * 65, "a%0A", "%C3%A9", "a%00", "a%5Cb", "a,b"])
def test_a_bad_name_is_refused(server, parts, name):
    refused(server.http.put(f"/adapters/{name}", files=parts), 422, "name")
    assert server.http.get(f"/adapters/{name}").status_code in (404, 422)


@pytest.mark.parametrize("path", ["a/b", "..%2f..%2fx", "%2e%2e/x", ""])
def test_a_path_is_no_name(server, parts, path):
    assert server.http.put(f"/adapters/{path}", files=parts).status_code in (404, 405, 422)


# --- the form ---------------------------------------------------------------------------------------------------------


def test_missing_double_and_unknown_parts(server, parts):
    put = server.http.put
    refused(put("/adapters/form", files={"config": parts["config"]}), 422, "weights")
    refused(put("/adapters/form", files={"weights": parts["weights"]}), 422, "config")
    refused(put("/adapters/form", files={"other": b"x", "weights": parts["weights"]}), 422)
    refused(put("/adapters/form", files=[("config", b"{}"), ("config", b"{}")]), 422, "config")
    refused(put("/adapters/form", files=[*parts.items(), ("weights", b"x")]), 422)
    refused(put("/adapters/form", files=parts, data={"extra": "x"}), 422)
    refused(put("/adapters/form", files={"config": parts["config"]}, data={"weights": "text"}), 422, "weights")
    refused(server.http.get("/adapters/form"), 404)


def test_the_config_may_be_a_text_field(server, parts):
    response = server.http.put(
        "/adapters/text", files={"weights": parts["weights"]}, data={"config": parts["config"].decode()}
    )
    assert response.status_code == 201
    assert response.json()["digest"] == digest_of(server)


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("text/plain", b"x"),
        ("application/octet-stream", b"x"),
        ("application/x-www-form-urlencoded", b"config=1&weights=2"),
        ("multipart/form-data", b"no boundary"),
        ("multipart/form-data; boundary=x", b""),
        ("multipart/form-data; boundary=x", b"not a form"),
        ("multipart/form-data; boundary=x", b'--x\r\nContent-Disposition: form-data; name="config"\r\n\r\n{'),
        ("application/json", b""),
        ("application/json", b"{"),
        ("application/json", b"[]"),
        ("application/json", b"{}"),
        ("application/json", b'{"source": 5}'),
        ("application/json", b'{"source": "x", "more": 1}'),
        ("application/json", b'{"source": "\xff"}'),
        ("application/json", b'{"source": "' + b"x" * 5000 + b'"}'),
    ],
)
def test_another_body_is_refused(server, kind, content):
    refused(server.http.put("/adapters/body", content=content, headers={"content-type": kind}), 422)


def form(parts, boundary=b"x"):
    """The multipart body in pieces, so that httpx sends it without a length."""
    for key, value in parts.items():
        yield b"--%s\r\n" % boundary
        yield b'Content-Disposition: form-data; name="%s"; filename="f"\r\n\r\n' % key.encode()
        for at in range(0, len(value), 65536):
            yield value[at : at + 65536]
        yield b"\r\n"
    yield b"--%s--\r\n" % boundary


def put_chunked(server, name, parts):
    kind = {"content-type": "multipart/form-data; boundary=x"}
    return server.http.put(f"/adapters/{name}", content=form(parts), headers=kind)


def test_an_upload_may_come_without_a_length(server, parts):
    assert put_chunked(server, "chunked", parts).status_code == 201


@pytest.mark.parametrize("extra", [1, 200_000, 5_000_000])
def test_an_upload_over_the_cap_is_413(server, parts, extra):
    """By a byte (seen when the form is read) and by more (seen when the body is). At the cap, it is looked at."""
    refused(server.http.put("/adapters/a", files={"config": parts["config"], "weights": b"\0" * CAP}), 422)
    large = {"config": parts["config"], "weights": b"\0" * (CAP + extra)}
    assert refused(server.http.put("/adapters/a", files=large), 413)["code"] == "too_large"
    assert refused(put_chunked(server, "a", large), 413)["code"] == "too_large"
    large = {"config": b" " * 70_000, "weights": parts["weights"]}
    refused(server.http.put("/adapters/a", files=large), 413, "config")


def test_json_has_its_own_cap(server):
    content = b'{"source": "' + b"x" * (9 * 1024 * 1024) + b'"}'
    refused(server.http.put("/adapters/a", content=content, headers={"content-type": "application/json"}), 413)


def staged(server):
    return list((server.settings.data_dir / "adapters" / "staging").glob("*"))


def test_nothing_is_left_of_a_refused_upload(server, parts):
    refused(server.http.put("/adapters/a", files={**parts, "weights": b"x"}), 422)
    assert staged(server) == []


def test_a_client_gone_while_uploading_leaves_nothing(server, parts, caplog):
    def half():
        for at, piece in enumerate(form(parts)):
            if at == 3:
                raise RuntimeError("unplugged")
            yield piece

    before = digest_of(server)
    with pytest.raises(RuntimeError, match="unplugged"):
        server.http.put("/adapters/a", content=half(), headers={"content-type": "multipart/form-data; boundary=x"})
    assert server.http.get("/healthz").status_code == 200
    assert digest_of(server) == before
    until(lambda: not staged(server))  # the server learns of it a moment later
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


# --- sources ----------------------------------------------------------------------------------------------------------


def test_a_source_is_taken_where_the_settings_allow_it(server, adapters, tmp_path):
    (allowed,) = server.settings.adapter_sources
    folder = tmp_path.joinpath("/", allowed.removeprefix("file://"), "good")
    folder.mkdir(exist_ok=True)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / file).write_bytes((adapters[1] / file).read_bytes())
    response = server.http.put("/adapters/fetched", json={"source": f"{allowed}good"})
    assert response.status_code == 201
    assert response.headers["etag"] == server.put("pushed", adapters[1]).headers["etag"]
    assert refused(server.http.put("/adapters/fetched", json={"source": f"{allowed}none"}), 422, "source")
    for source in (f"file://{adapters[1]}", f"{allowed}../..", "hf://acme/x", "s3://bucket/x", "file:///etc"):
        assert refused(server.http.put("/adapters/fetched", json={"source": source}), 403, "source")
    for source in ("http://x/y", "good", "file://"):
        assert server.http.put("/adapters/fetched", json={"source": source}).status_code in (403, 422)


# --- files that are refused -------------------------------------------------------------------------------------------


def good(adapters):
    return entries_of(load_file(adapters[0] / "adapter_model.safetensors"))


def changed_tensor(adapters, change):
    values = load_file(adapters[0] / "adapter_model.safetensors")
    name = list(values)[-1]
    return save({**values, name: change(values[name].clone())})


def with_value(value):
    def change(tensor):
        tensor[-1, -1] = value
        return tensor

    return change


def renamed(adapters, old, new):
    values = load_file(adapters[0] / "adapter_model.safetensors")
    return save({name.replace(old, new): value for name, value in values.items()})


def first_entry(adapters, **fields):
    header, data = good(adapters)
    first = next(iter(header))
    return container({**header, first: {**header[first], **fields}}, data)


BAD_WEIGHTS = {
    "empty": lambda a: b"",
    "pickle": lambda a: pickle.dumps({"a": 1}),
    "torch zip": lambda a: b"PK\x03\x04" + b"\0" * 100,
    "gguf": lambda a: b"GGUF\x03\0\0\0" + b"\0" * 100,
    "truncated header": lambda a: container(*good(a))[:100],
    "truncated data": lambda a: container(*good(a))[:-1],
    "bytes behind the end": lambda a: container(*good(a)) + b"\0",
    "a header length beyond the file": lambda a: container(*good(a), length=10**8),
    "a header length of 2**64 - 1": lambda a: container(*good(a), length=2**64 - 1),
    "a header of lists": lambda a: container(b'{"a":' * 5000),
    "lying dtype": lambda a: first_entry(a, dtype="F16"),
    "lying offsets": lambda a: first_entry(a, data_offsets=[0, 2**63]),
    "shape that overflows": lambda a: first_entry(a, shape=[2**32, 2**32 + 1]),
    "shape that does not fit": lambda a: changed_tensor(a, lambda t: t[:-1].contiguous()),
    "NaN": lambda a: changed_tensor(a, with_value(float("nan"))),
    "Inf": lambda a: changed_tensor(a, with_value(float("inf"))),
    "keys that match nothing": lambda a: renamed(a, "q_proj", "query"),
    "a layer that is not there": lambda a: renamed(a, "layers.2.", "layers.7."),
    "a tensor that is missing": lambda a: save(dict(list(load_file(a[0] / "adapter_model.safetensors").items())[:-1])),
    "no effect": lambda a: save(
        {n: t * ("lora_A" in n) for n, t in load_file(a[0] / "adapter_model.safetensors").items()}
    ),
}
BAD_CONFIG = {
    "not JSON": b"{",
    "a list": b"[]",
    "not UTF-8": b"\xff\xfe",
    "deep": b'{"a":' * 5000,
    "NaN": b'{"r": NaN}',
    "base_model_name_or_path": "acme/another",
    "peft_type": "IA3",
    "use_dora": True,
    "auto_mapping": {"base_model_class": "os.system", "parent_library": "os"},
    "modules_to_save": ["lm_head"],
    "bias": "all",
    "r": 64,
    "rank_pattern": {"q_proj": 64},
    "target_modules": ["lm_head"],
    "alpha_pattern": {"q_proj": float("inf")},
    "code": "import os",
}


def refused_and_the_version_before_serves(server, config, weights):
    before, tokens = digest_of(server), server.generate(adapter="a")["choices"]
    error = refused(server.http.put("/adapters/a", files={"config": config, "weights": weights}), 422)
    assert error["type"] == "invalid_request_error"
    assert error["param"]
    assert str(server.settings.data_dir) not in error["message"]
    after = server.generate(adapter="a")
    assert digest_of(server) == after["adapter"]["digest"] == before
    assert after["choices"] == tokens
    return error


@pytest.mark.parametrize("kind", BAD_WEIGHTS)
def test_bad_weights_are_refused_with_a_reason(server, adapters, parts, kind):
    refused_and_the_version_before_serves(server, parts["config"], BAD_WEIGHTS[kind](adapters))


@pytest.mark.parametrize("kind", BAD_CONFIG)
def test_bad_configs_are_refused_with_a_reason(server, adapters, parts, kind):
    value = BAD_CONFIG[kind]
    whole = value if isinstance(value, bytes) else json.dumps(config_of(adapters[0]) | {kind: value}).encode()
    error = refused_and_the_version_before_serves(server, whole, parts["weights"])
    if not isinstance(value, bytes):
        assert error["param"].split(".")[0] in (kind, "config") or kind in error["message"]


def test_no_effect_is_let_in_on_request(server, parts, adapters):
    files = {**parts, "weights": BAD_WEIGHTS["no effect"](adapters)}
    assert refused(server.http.put("/adapters/zero", files=files), 422)["code"] == "zero_effect"
    assert server.http.put("/adapters/zero", files=files, params={"allow_zero": "true"}).status_code == 201
    zero, base = server.generate(adapter="zero"), server.generate()
    assert zero["adapter"]["name"] == "zero"
    assert zero["choices"][0]["token_ids"] == base["choices"][0]["token_ids"]
    refused(server.http.put("/adapters/zero", files=files, params={"allow_zero": "maybe"}), 422, "allow_zero")


# --- in flight, and after a restart -----------------------------------------------------------------------------------


def replace_it(server, adapters):
    assert server.put("busy", adapters[1]).status_code == 200


def delete_it(server, adapters):
    assert server.http.delete("/adapters/busy").status_code == 204


def delete_and_put_it(server, adapters):
    delete_it(server, adapters)
    assert server.put("busy", adapters[1]).status_code == 201
    assert server.generate(adapter="busy")["adapter"]["version"] == 1


@pytest.mark.parametrize("change", [replace_it, delete_it, delete_and_put_it])
def test_a_stream_finishes_on_the_version_it_began_with(server, adapters, gate, change):
    gate.open()
    old = server.put("busy", adapters[0]).json()
    settings = {"adapter": "busy", "max_tokens": 40, "ignore_eos": True}
    alone = server.generate(**settings)
    until(lambda: server.engine.stats.running == 0)
    gate.close()
    chunks = []
    thread = threading.Thread(target=lambda: chunks.extend(server.stream(**settings)))
    entered = gate.entered
    thread.start()
    until(lambda: gate.entered > entered)
    changing = threading.Thread(target=change, args=(server, adapters))
    changing.start()
    if change is not delete_and_put_it:  # that one needs the engine for a request of its own
        changing.join(20)
    gate.open()
    thread.join(30)
    changing.join(20)
    assert {chunk["adapter"]["digest"] for chunk in chunks} == {old["digest"]}
    assert {chunk["adapter"]["version"] for chunk in chunks} == {old["version"]}
    tokens = [token for chunk in chunks for token in chunk["choices"][0]["token_ids"]]
    assert tokens == alone["choices"][0]["token_ids"]
    server.idle()
    if change is not delete_it:
        now = server.generate(**settings)
        assert now["adapter"]["digest"] != old["digest"]
        assert now["choices"][0]["token_ids"] != tokens
        assert server.http.get("/adapters/busy").json()["in_flight"] == 0
        server.http.delete("/adapters/busy")


def test_everything_is_there_after_a_restart(base, adapters, tmp_path):
    with Server(base, tmp_path / "data") as server:
        for folder in adapters:
            server.put("many", folder)
        server.put("one", adapters[1])
        server.put("gone", adapters[2])
        server.http.delete("/adapters/gone")
        server.http.post("/adapters/many/rollback", json={"version": 2})
        versions = server.http.get("/adapters/many/versions").json()
        listed = server.http.get("/adapters").json()
        tokens = server.generate(adapter="many")["choices"]
    with Server(base, tmp_path / "data") as server:
        assert server.http.get("/adapters").json() == listed
        assert server.http.get("/adapters/many/versions").json() == versions
        again = server.generate(adapter="many")
        assert again["choices"] == tokens
        assert again["adapter"]["version"] == 2
        assert server.put("many", adapters[0]).json()["version"] == 4


def test_a_directory_of_adapters_is_registered_at_the_start(base, adapters, tmp_path, caplog):
    folder = tmp_path / "shipped"
    for name, source in (("one", adapters[0]), ("two", adapters[1]), ("Bad Name", adapters[0]), ("half", adapters[0])):
        shutil.copytree(source, folder / name)
    (folder / "half" / "adapter_model.safetensors").unlink()
    with Server(base, tmp_path / "data", preload=folder) as server:
        listed = server.http.get("/adapters").json()["data"]
        assert [(one["name"], one["version"], one["public"]) for one in listed] == [("one", 1, True), ("two", 1, True)]
        two = server.put("one", adapters[1]).json()
        assert server.http.patch("/adapters/two", json={"public": False}).json()["public"] is False
    assert all(name in caplog.text for name in ("Bad Name", "half"))
    with Server(base, tmp_path / "data", preload=folder) as server:  # what a user has put there since stays
        one = server.http.get("/adapters/one").json()
        assert (one["digest"], one["public"]) == (two["digest"], True)
        assert server.http.get("/adapters/two").json()["public"] is False
    record = next((tmp_path / "data/adapters/names/default").iterdir())
    record.write_text("{broken")
    with Server(base, tmp_path / "data", preload=folder) as server:  # nobody may get other weights under that name
        assert server.http.get(f"/adapters/{record.stem}").status_code == 404
    assert record.read_text() == "{broken"
    with Server(base, tmp_path / "other", preload=tmp_path / "nothing") as server:
        assert server.http.get("/adapters").json()["data"] == []
    assert "there is no directory" in caplog.text


def test_a_crash_while_adapters_are_registered_leaves_none_private(base, adapters, tmp_path, monkeypatch):
    folder = tmp_path / "shipped"
    for name in ("one", "two"):
        shutil.copytree(adapters[0], folder / name)
    write = Store.write_name

    class Crash(BaseException):
        pass

    def crash(store, *record):
        write(store, *record)
        raise Crash

    with monkeypatch.context() as broken:
        broken.setattr(Store, "write_name", crash)
        with pytest.raises(Crash):
            Server(base, tmp_path / "data", preload=folder)
    with Server(base, tmp_path / "data", preload=folder) as server:
        listed = server.http.get("/adapters").json()["data"]
        assert [(one["name"], one["public"]) for one in listed] == [("one", True), ("two", True)]


def test_sources_are_refused_by_default(base, adapters, tmp_path):
    with Server(base, tmp_path / "data") as server:
        for source in (f"file://{adapters[0]}", "hf://acme/adapter", "s3://bucket/adapter"):
            error = refused(server.http.put("/adapters/x", json={"source": source}), 403, "source")
            assert error["type"] == "permission_error"


# --- receiving --------------------------------------------------------------------------------------------------------


def raw_put(server, kind, parts):
    boundary = "x"
    body = b"".join(
        b"--x\r\ncontent-disposition: form-data; " + head + b"\r\n\r\n" + data + b"\r\n" for head, data in parts
    )
    headers = {"content-type": f"multipart/form-data; boundary={boundary}{kind}"}
    return server.http.put("/adapters/raw", content=body + b"--x--\r\n", headers=headers)


@pytest.mark.parametrize(("kind", "config"), [("; charset=undefined", b"{}"), ("; charset=utf-7", b"+2AA-")])
def test_a_charset_that_makes_no_text_is_the_clients_fault(server, parts, kind, config):
    response = raw_put(server, kind, [(b"name=config", config), (b'name=weights; filename="w"', parts["weights"])])
    refused(response, 422)
    server.idle()


def test_a_config_of_too_much_text_is_413(server, parts):
    response = raw_put(server, "", [(b"name=config", b" " * 65_537), (b'name=weights; filename="w"', parts["weights"])])
    assert refused(response, 413, "config")["code"] == "too_large"


def test_a_full_temporary_directory_is_507(server, parts, monkeypatch):
    def full(self, *arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("starlette.datastructures.UploadFile.write", full)
    response = server.http.put("/adapters/full", files=parts)
    refused(response, 507)
    monkeypatch.undo()
    assert server.http.put("/adapters/full", files=parts).status_code == 201


def test_only_so_many_uploads_are_under_way_at_once(server, parts):
    uploads = server.state.uploads
    with contextlib.ExitStack() as held:
        for _ in range(uploads.most - 1):
            held.enter_context(uploads.taking("default"))
        response = server.http.put("/adapters/last-one", files=parts)
        assert response.status_code == 201, "without keys there is nobody to leave a part to"
        held.enter_context(uploads.taking("default"))
        for body in ({"files": parts}, {"json": {"source": "file:///nowhere"}}):
            response = server.http.put("/adapters/one-more", **body)
            assert refused(response, 503)["code"] == "uploads_full"
            assert response.headers["retry-after"] == "5"
    assert server.http.put("/adapters/one-more", files=parts).status_code == 201
    assert uploads.taken == 0


def test_an_upload_that_never_ends_is_given_up(server, monkeypatch):
    monkeypatch.setattr("server.api.adapters.RECEIVE_SECONDS", 0.3)
    address = httpx.URL(server.url)
    with socket.create_connection((address.host, address.port), timeout=10) as connection:
        connection.sendall(
            b"PUT /adapters/slow HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\nconnection: close\r\n"
            b"content-type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
        )
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert b"422" in answer.split(b"\r\n")[0]
    assert b"upload_timeout" in answer
    assert server.state.uploads.taken == 0
