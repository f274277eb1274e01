"""Servers' own routes around the stub's model, in the shapes that their sources have.

with LlamaCppStub(model) as server: ...       # and SGLangStub, LightllmStub, TGIStub
"""

from stub_server import StubServer


class Natives(StubServer):
    """Samples come from the stub's /v1/completions; what differs is how it is said."""

    def completed(self, prompt, sampling, logprobs=None):
        """(status, the answer, its only choice)"""
        body = {"prompt": prompt, "max_tokens": sampling["max_new"], "stop": sampling["stop"]}
        body |= {"temperature": sampling["temperature"]}
        body |= {"seed": sampling["seed"]} if sampling.get("seed") is not None else {}
        status, found = self.completion(body)
        return status, found, found["choices"][0] if status == 200 else None

    def ids_of(self, prompt):
        return self.encode(prompt) if isinstance(prompt, str) else prompt


class LlamaCppStub(Natives):
    def __init__(self, model, **options):
        super().__init__(model, owner="llamacpp", **options)
        self.posts = {"/completion": self.native, "/tokenize": self.tokens}
        self.gets |= {"/props": lambda: {"default_generation_settings": {"n_ctx": self.context}}}
        self.tokenize = False  # in vLLM's form

    def listed(self):
        data = [{"id": "tiny", "owned_by": "llamacpp", "meta": {"n_vocab": 257}}]
        return {"object": "list", "data": data}

    def tokens(self, body):
        if "content" not in body:
            return 200, {"tokens": []}
        return 200, {"tokens": self.encode(body["content"])}

    def native(self, body):
        assert body["min_p"] == 0 and body["repeat_penalty"] == 1 and not body["cache_prompt"]
        sampling = body | {"max_new": body["n_predict"]}
        status, found, choice = self.completed(body["prompt"], sampling)
        if status != 200:
            return status, found
        said = {"content": choice["text"], "stop": True, "truncated": False}
        said["stop_type"] = {"length": "limit", "stop": "eos"}[choice["finish_reason"]]
        said |= {
            "tokens_evaluated": found["usage"]["prompt_tokens"],
            "tokens_predicted": found["usage"]["completion_tokens"],
        }
        if body.get("n_probs"):
            logs = self.logprobs(self.ids_of(body["prompt"]))[-1]
            ids = logs.topk(min(body["n_probs"], len(logs))).indices.tolist()
            top = [{"id": i, "token": "?", "logprob": float(logs[i])} for i in ids]
            said["completion_probabilities"] = [{**top[0], "top_logprobs": top}]
        if body.get("stream"):
            pieces = [{"content": piece, "stop": False} for piece in choice["text"]]
            return 200, [*pieces, said | {"content": ""}]
        return 200, said


class SGLangStub(Natives):
    def __init__(self, model, **options):
        super().__init__(model, owner="sglang", keeps_stop=True, **options)
        self.posts, self.starts = {"/generate": self.native}, []

    def native(self, body):
        own = body["sampling_params"]
        assert own["no_stop_trim"] and own["min_p"] == 0 and own["repetition_penalty"] == 1
        sampling = own | {"max_new": own["max_new_tokens"], "seed": own.get("sampling_seed")}
        prompt = body["input_ids"] if "input_ids" in body else body["text"]
        status, found, choice = self.completed(prompt, sampling)
        if status != 200:
            return status, found
        ids, usage = self.ids_of(prompt), found["usage"]
        about = {"finish_reason": {"type": choice["finish_reason"]}, **usage}
        if body.get("return_logprob"):
            logs, start = self.logprobs(ids), body["logprob_start_len"]
            new = int(logs[-1].argmax())
            about["output_token_logprobs"] = [[float(logs[-1, new]), new, None]]
            if start >= 0:
                self.starts.append(start)
                told = [[float(logs[i - 1, ids[i]]), ids[i], None] for i in range(1, len(ids))]
                about["input_token_logprobs"] = [[None, ids[start], None], *told[start:]]
                tops = [[[float(row.max()), int(row.argmax()), None]] for row in logs[start:-1]]
                about["input_top_logprobs"] = [None, *tops]
            if body.get("token_ids_logprob"):
                named = [[float(logs[-1, i]), i, None] for i in body["token_ids_logprob"]]
                about["output_token_ids_logprobs"] = [named]
        said = {"text": choice["text"], "meta_info": about}
        if body.get("stream"):
            so_far = [said | {"text": said["text"][: i + 1]} for i in range(len(said["text"]))]
            for piece in so_far:
                piece["meta_info"] = about | {"finish_reason": None}
            return 200, [*so_far, said]
        return 200, said


class LightllmStub(Natives):
    """prompts: as with --return_all_prompt_logprobs."""

    def __init__(self, model, prompts=True, **options):
        super().__init__(model, keeps_stop=True, seeds=False, **options)
        self.prompts = prompts
        self.posts = {"/generate": self.native, "/generate_stream": self.native_stream}
        self.gets = {"/get_model_name": lambda: {"model_name": "tiny"}}
        self.tokenize = False

    def native(self, body):
        own = body["parameters"]
        sampling = {"max_new": own["max_new_tokens"], "stop": own["stop_sequences"]}
        sampling["temperature"] = own["temperature"] if own["do_sample"] else 0
        status, found, choice = self.completed(body["inputs"], sampling)
        if status != 200:
            return 417, {"message": found["error"]["message"]}
        ids, usage = self.ids_of(body["inputs"]), found["usage"]
        said = {"generated_text": [choice["text"]], "finish_reason": choice["finish_reason"]}
        said |= {"count_output_tokens": usage["completion_tokens"], "prompt_tokens": len(ids)}
        logs = self.logprobs(ids)
        if own.get("return_details"):
            new = int(logs[-1].argmax())
            said["tokens"] = [{"id": new, "logprob": float(logs[-1, new]), "text": "?"}]
        if self.prompts:
            said["prompt_token_ids"] = ids
            said["prompt_logprobs"] = [
                [a, {str(b): float(row[b])}] for a, b, row in zip(ids, ids[1:], logs)
            ]
        return 200, said

    def native_stream(self, body):
        status, said = self.native(body)
        if status != 200:
            return status, said
        counts = {name: said[name] for name in ("count_output_tokens", "prompt_tokens")}
        text, told = said["generated_text"][0], []
        for i, piece in enumerate(text or " "):
            last = i == len(text or " ") - 1
            token = {"id": 0, "text": piece if text else "", "special": not text, **counts}
            reason = said["finish_reason"] if last else None
            told.append({"token": token, "finished": last, "finish_reason": reason})
        return 200, told


class TGIStub(Natives):
    """It has no answer of OpenAI's that scores."""

    def __init__(self, model, **options):
        super().__init__(model, ids=False, keeps_stop=True, **options)
        self.posts = {"/generate": self.native, "/generate_stream": self.native_stream}
        self.posts["/tokenize"] = self.tokens
        self.gets = {
            "/info": lambda: {"model_id": "tiny", "max_total_tokens": self.context, "router": "x"}
        }
        self.tokenize = False

    def tokens(self, body):
        if "inputs" not in body:
            return 422, {"error": "missing field inputs", "error_type": "validation"}
        return 200, {"many": [{"id": i, "text": "?"} for i in self.encode(body["inputs"])]}

    def native(self, body):
        own = body["parameters"]
        assert own.get("temperature") != 0 and own.get("top_p") != 1 and own["details"]
        sampling = {"max_new": own["max_new_tokens"], "stop": own["stop"], "seed": own.get("seed")}
        sampling["temperature"] = own["temperature"] if own["do_sample"] else 0
        status, found, choice = self.completed(body["inputs"], sampling)
        if status != 200:
            return 422, {"error": str(found), "error_type": "validation"}
        ids = self.encode(body["inputs"])
        logs = self.logprobs(ids)
        new = int(logs[-1].argmax())
        reason = {"length": "length", "stop": "stop_sequence"}[choice["finish_reason"]]
        about = {"finish_reason": reason, "generated_tokens": found["usage"]["completion_tokens"]}
        about |= {"prefill": [], "tokens": [{"id": new, "logprob": float(logs[-1, new])}]}
        if own.get("decoder_input_details"):
            values = [None, *(float(row[b]) for row, b in zip(logs, ids[1:]))]
            about["prefill"] = [{"id": i, "logprob": v} for i, v in zip(ids, values)]
        if own.get("top_n_tokens"):
            assert own["top_n_tokens"] <= 5
            top = logs[-1].topk(own["top_n_tokens"]).indices.tolist()
            about["top_tokens"] = [[{"id": i, "logprob": float(logs[-1, i])} for i in top]]
        return 200, {"generated_text": choice["text"], "details": about}

    def native_stream(self, body):
        status, said = self.native(body)
        if status != 200:
            return status, said
        text = said["generated_text"]
        told = [{"token": {"text": piece, "special": False}} for piece in text[:-1]]
        last = {"token": {"text": text[-1:], "special": not text}}
        return 200, [*told, last | said | {"details": said["details"] | {"prefill": []}}]
