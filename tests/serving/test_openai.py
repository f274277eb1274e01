"""OpenAI's own client against a server: what it parses is what we said."""

import pytest

openai = pytest.importorskip("openai", reason="the openai package is not installed: no oracle")


def test_openai_reads_our_answers(client):
    theirs = openai.OpenAI(base_url=f"{client.url}/v1", api_key="any", max_retries=0)
    assert [model.id for model in theirs.models.list()] == ["checkpoint-10"]
    asked = {"model": "checkpoint-10", "max_tokens": 6, "seed": 4}
    ours = client.complete(prompt="ab", max_tokens=6, seed=4, logprobs=2)[0]
    found = theirs.completions.create(prompt="ab", logprobs=2, **asked).choices[0]
    assert (found.text, found.finish_reason) == (ours["text"], ours["finish_reason"])
    assert found.logprobs.token_logprobs == ours["logprobs"]["token_logprobs"]
    parts = theirs.completions.create(prompt="ab", stream=True, **asked)
    assert "".join(part.choices[0].text for part in parts) == ours["text"]
    messages = [{"role": "user", "content": "hi"}]
    chat = theirs.chat.completions.create(
        messages=messages, logprobs=True, top_logprobs=2, **asked
    ).choices[0]
    parts = theirs.chat.completions.create(
        messages=messages, stream=True, stream_options={"include_usage": True}, **asked
    )
    said = [p.choices[0].delta.content or "" if p.choices else p.usage for p in parts]
    assert "".join(said[:-1]) == chat.message.content
    assert said[-1].completion_tokens == len(chat.logprobs.content)
    with pytest.raises(openai.BadRequestError) as caught:
        theirs.completions.create(prompt="a" * 300, **asked)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        theirs.completions.create(prompt="a", model="other")
