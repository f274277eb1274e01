"""Which kind of server it is, and what it states of its model: by its routes, each its own way.

kind, stated = found(client, "the-model")
only_model(client)                               # where no name was given
tokens_of(client, text)                          # of /tokenize, or None
"""

from typing import Any

from backends import SERVERS
from endpoints.client import Client, NotThere, Refused

# of a model, as /v1/models says
OWNERS = {"llamacpp": "llama.cpp", "me": "llama-cpp-python"}
STATED = ("id", "root", "parent", "owned_by", "max_model_len", "meta")  # not: times, random ids
TOKENIZE = (  # routes, and the bodies that servers take there
    ("/tokenize", lambda text: {"prompt": text, "add_special_tokens": False}),
    ("/tokenize", lambda text: {"content": text, "add_special": False, "parse_special": False}),
    ("/tokenize", lambda text: {"inputs": text, "add_special_tokens": False}),
    ("/extras/tokenize", lambda text: {"input": text}),
)


def only_model(client: Client) -> str:
    """The name of the one model that is served. ValueError where there are several, or none is
    named."""
    names = [each.get("id") for each in _listed(client)]
    if not names:
        for path, key in (("/get_model_name", "model_name"), ("/info", "model_id")):
            about = client.get(path)
            names += [about[key]] if isinstance(about, dict) and about.get(key) else []
    if len(names) != 1 or not isinstance(names[0], str):
        there = f"serves {', '.join(map(str, names[:20]))}" if names else "names no models"
        raise ValueError(f"{client.root} {there}: say which with --model")
    return names[0]


def found(client: Client, model: str) -> tuple[str, dict]:
    """(the kind of a server, what it states of a model). ValueError where it has no such model."""
    listed = _listed(client)
    ours = [each for each in listed if each.get("id") == model]
    stated = {name: ours[0][name] for name in STATED if name in ours[0]} if ours else {}
    owner = str(stated.get("owned_by"))
    kind = OWNERS.get(owner, owner if owner in SERVERS else "openai")
    if kind == "openai":
        kind = _by_routes(client, stated)
    if listed and not ours and kind != "transformers":  # who lists what lies in a cache
        names = ", ".join(str(each.get("id")) for each in listed[:20])
        raise ValueError(f"{client.root} serves no --model {model}, but {names}")
    return kind, stated


def _listed(client: Client) -> list[dict]:
    answer = client.get("/v1/models")
    data = answer.get("data") if isinstance(answer, dict) else None
    return [each for each in data if isinstance(each, dict)] if isinstance(data, list) else []


def _by_routes(client: Client, stated: dict) -> str:
    """Of servers that /v1/models does not tell apart; what another route states is added."""
    about = client.get("/info")
    if isinstance(about, dict) and "max_total_tokens" in about:
        names = "model_id", "model_sha", "model_dtype", "max_total_tokens", "version"
        stated |= {name: about[name] for name in names if name in about}
        return "tgi"
    about = client.get("/get_model_name")
    if isinstance(about, dict) and "model_name" in about:
        stated |= {"model_name": about["model_name"]}
        return "lightllm"
    about = client.get("/openapi.json")
    paths = about.get("paths") if isinstance(about, dict) else None
    if isinstance(paths, dict) and {"/load_model", "/v1/responses"} <= paths.keys():
        return "transformers"
    return "openai"


def context_of(client: Client, stated: dict, kind: str) -> int | None:
    """Tokens of a prompt and what follows it."""
    context: Any = stated.get("max_model_len") or stated.get("max_total_tokens")
    if context is None and kind == "llama.cpp":
        props = client.get("/props")
        settings = props.get("default_generation_settings") if isinstance(props, dict) else None
        context = settings.get("n_ctx") if isinstance(settings, dict) else None
    return context if isinstance(context, int) and context > 0 else None


def tokens_of(client: Client, text: str) -> list[int] | None:
    """Those that the server reads a text as, if it tells them."""
    for path, make in TOKENIZE:
        try:
            answer = client.ask("POST", path, make(text))
        except (Refused, NotThere):
            continue
        ids = answer.get("tokens") if isinstance(answer, dict) else answer
        if isinstance(ids, list) and ids:
            ids = [one.get("id") if isinstance(one, dict) else one for one in ids]
            if all(type(i) is int for i in ids):
                return ids
    return None
