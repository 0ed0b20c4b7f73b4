"""How each family of vision-language models writes a chat: its special tokens and its Jinja template.

Tokens and structure are those of the released models, so that what finds the image, the closing text behind it and the
answer in a tiny model finds them in the real one.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ChatFormat:
    """What a tokenizer and a processor need to know of a family's chat."""

    template: str
    eos: str
    pad: str
    image: str  # the token that stands for one image feature
    bos: str | None = None
    adds_bos: bool = False  # by the tokenizer, in front of every text
    named: dict[str, str] = field(default_factory=dict)  # attribute of the tokenizer: token; the processor reads them
    special: tuple[str, ...] = ()  # special tokens without a name
    words: tuple[str, ...] = ()  # of the template; the tokenizer is trained on them too
    end: str | None = None  # what ends an answer, where that is not `eos`

    @property
    def ends(self) -> tuple[str, ...]:
        """Tokens at which an answer ends."""
        return tuple(filter(None, (self.end, self.eos)))


# The image first, then the text; no token ends an answer.
_LLAVA = """\
{%- for message in messages %}
    {%- if message.role != 'system' %}{{- message.role.upper() + ': ' }}{% endif %}
    {%- for part in message.content if part.type == 'image' %}{{- '<image>\n' }}{% endfor %}
    {%- for part in message.content if part.type == 'text' %}
        {%- if message.role == 'assistant' %}
            {%- generation %}{{- part.text + ' ' }}{% endgeneration %}
        {%- else %}
            {{- part.text + ' ' }}
        {%- endif %}
    {%- endfor %}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'ASSISTANT:' }}{% endif %}"""

_LLAVA_ONEVISION = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- for part in message.content if part.type == 'image' %}{{- '<image>\n' }}{% endfor %}
    {%- for part in message.content if part.type == 'video' %}{{- '<video>\n' }}{% endfor %}
    {%- for part in message.content if part.type == 'text' %}
        {%- if message.role == 'assistant' %}
            {%- generation %}{{- part.text }}{% endgeneration %}
        {%- else %}
            {{- part.text }}
        {%- endif %}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""

# ChatML with the parts in their order. IMAGE and VIDEO stand for what a family writes there, SYSTEM for what it puts
# in front of a chat without a system message.
_CHATML = """\
{%- if messages[0].role != 'system' %}{{- 'SYSTEM' }}{% endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'image' %}{{- 'IMAGE' }}
            {%- elif part.type == 'video' %}{{- 'VIDEO' }}
            {%- elif part.type == 'text' %}{{- part.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""

# The system message goes into the first turn of the user; the assistant is called model.
_GEMMA3 = """\
{{- bos_token }}
{%- set system = namespace(text='') %}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {%- set content = message.content if message.content is string else message.content[0].text %}
        {%- set system.text = content + '\n\n' %}
    {%- else %}
        {{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' + system.text }}
        {%- set system.text = '' %}
        {%- if message.content is string %}
            {{- message.content | trim }}
        {%- else %}
            {%- for part in message.content %}
                {%- if part.type == 'image' %}{{- '<start_of_image>' }}
                {%- elif part.type == 'text' %}{{- part.text | trim }}
                {%- endif %}
            {%- endfor %}
        {%- endif %}
        {{- '<end_of_turn>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{% endif %}"""

# The released model has no chat: one question about an image, one answer. Its processor puts <bos> behind the image.
_PALIGEMMA = """\
{%- for message in messages %}
    {%- for part in message.content if part.type == 'image' %}{{- '<image>' }}{% endfor %}
    {%- for part in message.content if part.type == 'text' %}{{- part.text }}{% endfor %}
    {{- eos_token if message.role == 'assistant' else '\n' }}
{%- endfor %}"""

_CHATML_WORDS = ("system\n", "user\n", "assistant\n")
_DEFAULT_SYSTEM = "You are a helpful assistant."


def _llava() -> ChatFormat:
    return ChatFormat(
        _LLAVA,
        bos="<s>",
        eos="</s>",
        pad="<pad>",
        image="<image>",
        adds_bos=True,
        named={"image_token": "<image>"},
        words=("USER: ", " ASSISTANT: "),
    )


def _qwen(system: str | None) -> ChatFormat:
    vision = "<|vision_start|><|{}_pad|><|vision_end|>"
    first = f"<|im_start|>system\\n{system}<|im_end|>\\n" if system else ""
    template = _CHATML.replace("IMAGE", vision.format("image")).replace("VIDEO", vision.format("video"))
    return ChatFormat(
        template.replace("SYSTEM", first),
        eos="<|im_end|>",
        pad="<|endoftext|>",
        image="<|image_pad|>",
        special=("<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
        words=(*_CHATML_WORDS, _DEFAULT_SYSTEM),
    )


CHATS = {
    "llava": _llava(),
    "mistral_window": _llava(),
    "llava_onevision": ChatFormat(
        _LLAVA_ONEVISION,
        eos="<|im_end|>",
        pad="<|endoftext|>",
        image="<image>",
        named={"image_token": "<image>", "video_token": "<video>"},
        special=("<|im_start|>",),
        words=_CHATML_WORDS,
    ),
    "internvl": ChatFormat(
        _CHATML.replace("IMAGE", "<IMG_CONTEXT>\\n").replace("VIDEO", "<video>\\n").replace("SYSTEM", ""),
        eos="<|im_end|>",
        pad="<|endoftext|>",
        image="<IMG_CONTEXT>",
        named={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        special=("<|im_start|>",),
        words=_CHATML_WORDS,
    ),
    "qwen2_5_vl": _qwen(_DEFAULT_SYSTEM),
    "qwen3_vl": _qwen(None),
    "qwen3_5": _qwen(None),
    "gemma3": ChatFormat(
        _GEMMA3,
        bos="<bos>",
        eos="<eos>",
        pad="<pad>",
        image="<image_soft_token>",
        adds_bos=True,
        named={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
        special=("<start_of_turn>", "<end_of_turn>"),
        end="<end_of_turn>",
        words=("user\n", "model\n", "\n\n"),
    ),
    "paligemma": ChatFormat(
        _PALIGEMMA, bos="<bos>", eos="<eos>", pad="<pad>", image="<image>", named={"image_token": "<image>"}
    ),
}
