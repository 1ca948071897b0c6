"""ChatML for the Ouro and SmolLM2 vocabulary: token 0 is `<|endoftext|>`, 1 `<|im_start|>`, 2 `<|im_end|>`.

A message is `<|im_start|>role`, a new line, the content, `<|im_end|>`, a new line. The released Ouro files name token
0 as beginning, end and padding at once, so that nothing stops a chat; here a text begins with 1, ends with 2 and is
padded with 0. `enable_thinking` opens the answer with `<think>`, as the Thinking models were tuned on.
"""

from transformers import PreTrainedTokenizerBase

from looplm.data.chat import CHAT_TEMPLATE, TURN_END, TURN_START

CHAT_TOKENS = {"bos_token": TURN_START, "eos_token": TURN_END, "pad_token": "<|endoftext|>"}
CHAT_TOKEN_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def set_chatml(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer the tokens and the template of ChatML, in place; how it encodes text does not change.

    Raises:
        ValueError: its vocabulary has another token at 0, 1 or 2.
    """
    for (role, token), number in zip(CHAT_TOKENS.items(), CHAT_TOKEN_IDS.values(), strict=True):
        found = tokenizer.convert_ids_to_tokens(number)
        if found != token:
            raise ValueError(
                f"the tokenizer's token {number} is {found!r}; as {role} it must be {token!r}: "
                "ChatML is set for the vocabulary layout of Ouro and SmolLM2 only"
            )
    tokenizer.add_special_tokens(dict(CHAT_TOKENS))
    tokenizer.chat_template = CHAT_TEMPLATE
