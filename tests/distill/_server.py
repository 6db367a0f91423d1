"""A small OpenAI-compatible server of one model, for the tests of served teachers."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import torch


def log_probs(model, ids):
    with torch.no_grad():
        return model(ids).logits.log_softmax(-1)


class Server:
    """An OpenAI-compatible server of one model, in a thread; `dialect` chooses how it answers."""

    def __init__(self, model, dialect="prompt_logprobs"):
        self.failures, self.requests = 0, 0
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_GET(self):
                self.answer(200, {"data": [{"id": "small"}]})

            def do_POST(self):
                owner.requests += 1
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if owner.failures:
                    owner.failures -= 1
                    return self.answer(503, {"error": "busy"})
                if "n" in body:
                    choices = owner.drawn(model, body, dialect)
                else:
                    choices = [owner.choice(model, row, body["logprobs"], dialect) for row in body["prompt"]]
                return self.answer(200, {"choices": [{"index": i, **c} for i, c in enumerate(choices)][::-1]})

            def answer(self, code, body):
                data = json.dumps(body).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @staticmethod
    def choice(model, row, kept, dialect):
        law = log_probs(model, torch.tensor([row]))[0]
        top = law.topk(kept, -1)
        pairs = [list(zip(i.tolist(), v.tolist(), strict=True)) for i, v in zip(top.indices, top.values, strict=True)]
        own = law[:-1].gather(-1, torch.tensor(row[1:]).unsqueeze(-1)).squeeze(-1).tolist()
        if dialect in ("prompt_logprobs", "top alone"):
            said = [{str(i): {"logprob": v} for i, v in entry} for entry in pairs[:-1]]
            if dialect == "prompt_logprobs":  # the token that is there, beside the top
                said = [{**entry, str(i): {"logprob": v}} for entry, i, v in zip(said, row[1:], own, strict=True)]
            return {"text": "", "prompt_logprobs": [None, *said]}
        if dialect == "echo":
            said = [{f"token_id:{i}": v for i, v in entry} for entry in pairs]
            return {"text": "", "logprobs": {"top_logprobs": [None, *said], "token_logprobs": [None, *own]}}
        if dialect == "text":
            return {"text": "", "logprobs": {"top_logprobs": [None, *[{"the": -0.1}] * len(pairs)]}}
        return {"text": ""}

    @staticmethod
    def drawn(model, body, dialect):
        """Continuations of each prompt, with the tokens by their ids and their log-probabilities."""
        draw, choices = torch.Generator().manual_seed(body["seed"]), []
        for row in [row for row in body["prompt"] for _ in range(body["n"])]:
            ids, values = list(row), []
            while len(values) < body["max_tokens"] and not (values and ids[-1] in body["stop_token_ids"]):
                law = log_probs(model, torch.tensor([ids]))[0, -1]
                ids.append(int(torch.multinomial(law.exp(), 1, generator=draw)))
                values.append(law[ids[-1]].item())
            names = [f"token_id:{token}" for token in ids[len(row) :]]
            said = {"tokens": ["the"] * len(names) if dialect == "text" else names, "token_logprobs": values}
            choices.append({"text": "", "logprobs": None if dialect == "nothing" else said})
        return choices

    def close(self):
        self.server.shutdown()
        self.server.server_close()
