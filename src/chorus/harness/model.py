"""An answerer as a model of lm-evaluation-harness.

Tokens, chat templates, rolling windows and limits of length are those of the harness's own HFLM, so that
results can be compared with other models'. Only the computation differs: requests are answered by the
ensemble's passes, in which a mixture is one model.
"""

from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models import huggingface
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from chorus.errors import InputError
from chorus.harness.passes import Continuation, SharedPasses, TextRequest
from chorus.model.agents import causal_lm

HFLM: Any = huggingface.HFLM  # a decorator hides the class from type checkers
KNOWN = {"until", "max_gen_toks", "do_sample", "temperature", "top_p"}
PLAIN = {"num_beams": 1, "use_cache": True}  # generation arguments that have no effect here


class AnswererLM(HFLM):
    """One answerer of the passes that several of them share."""

    def __init__(self, passes: SharedPasses, answerer: int) -> None:
        agents = passes.ensemble.agents
        super().__init__(
            pretrained=causal_lm(agents.peft_model(agents.agents[0])),
            tokenizer=passes.ensemble.tokenizer,
            backend="causal",
            batch_size=passes.batch_size or 64,  # windows of rolling log-likelihoods in one batch
        )
        self.passes, self.answerer = passes, answerer

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Likelihoods of (request, context ids, continuation ids); too long a context loses its beginning."""
        wanted = []
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise InputError(
                    f"a continuation of {len(continuation)} tokens is longer than the base's "
                    f"{self.max_length} positions; leave out that task"
                )
            ids = (*context, *continuation)[-(self.max_length + 1) :]
            wanted.append(Continuation(tuple(ids), len(continuation)))
        likelihoods = self.passes.likelihoods(self.answerer, wanted)
        found = [(one.log_likelihood, one.is_greedy) for one in likelihoods]
        for (request, *_), one in zip(requests, found, strict=True):
            if request is not None:
                self.cache_hook.add_partial("loglikelihood", request, one)
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts up to the first stop string, without it."""
        wanted = [self._text_request(*request.args) for request in requests]
        found = self.passes.texts(self.answerer, wanted)
        return [
            postprocess_generated_text(text, list(one.stop), None)
            for text, one in zip(found, wanted, strict=True)
        ]

    def _text_request(self, context: str, gen_kwargs: dict[str, Any]) -> TextRequest:
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(gen_kwargs, self.max_gen_toks))
        for name, value in kwargs.items():
            if name not in KNOWN and PLAIN.get(name, object()) != value:
                raise InputError(
                    f"generation_kwargs {name}={value!r}: known are {', '.join(sorted(KNOWN))}; "
                    "leave out that task"
                )
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        stop = handle_stop_sequences(kwargs["until"], eos=eos)
        room = self.max_length - kwargs["max_gen_toks"]
        if room <= 0:
            raise InputError(
                f"generation_kwargs max_gen_toks={kwargs['max_gen_toks']}: the base has {self.max_length} "
                "positions; set fewer with --gen_kwargs max_gen_toks=N"
            )
        return TextRequest(
            tuple(self.tok_encode(context, left_truncate_len=room)),
            tuple(stop),
            kwargs["max_gen_toks"],
            kwargs["temperature"] if kwargs["do_sample"] else 0.0,
            kwargs.get("top_p", 1.0),
        )
