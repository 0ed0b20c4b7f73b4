"""The page itself, in gradio: a place to drop an image, and what is said of it; nothing of it comes from the web.

Its one endpoint for programs is `/predict`: an image file in, `Judged.figures` out.
"""

from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI

from vitask_plugin.serve.doors import Doors, is_upload
from vitask_plugin.serve.judging import Judged
from vitask_plugin.serve.view import EMPTY, head_html, result_html

LARGEST_FILE = "100mb"
QUEUE = 32  # images that wait for the model at most
KEPT_SECONDS = 600  # that an uploaded file is kept at most; all are removed at the end


def make_app(
    judge: Callable[[Path, str], Judged], title: str, summary: str, uploads: str, hosts: frozenset[str] | None
) -> Doors:
    """The application to serve.

    Args:
        title: of the page. summary: what is said below it.
        uploads: gradio's folder for them, as $GRADIO_TEMP_DIR said before gradio was imported. hosts: see `Doors`.
    """

    def judged(given: str | None) -> Judged:
        if not is_upload(given and str(given), uploads):
            raise gr.Error("The file is not there any more; drop it again.", print_exception=False)
        return judge(Path(given), Path(given).name)

    def figures(given: str | None) -> dict[str, Any]:
        return judged(given).figures

    def show(given: str | None) -> tuple[str, None]:
        return result_html(judged(given)), None

    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)) as page:
        gr.HTML(head_html(title, summary), js_on_load=None, elem_id="vitask-head")
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=260):
                place = gr.File(label="Drop an image here", height=190)
            with gr.Column(scale=5, min_width=320):
                result = gr.HTML(EMPTY, js_on_load=None, elem_id="vitask-result")
        # Images are judged one after another, whoever sends them.
        one = {"concurrency_id": "model", "concurrency_limit": 1}
        place.upload(show, place, [result, place], api_visibility="private", show_progress_on=result, **one)
        gr.Button(visible=False).click(figures, place, gr.JSON(visible=False), api_name="predict", **one)
    page.queue(max_size=QUEUE, api_open=False)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    css = resources.files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    gr.mount_gradio_app(
        app,
        page,
        path="/",
        allowed_paths=[],
        show_error=False,
        max_file_size=LARGEST_FILE,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        run_history=False,
        footer_links=[],
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        head=f"<style>{css}</style>",  # as it is: gradio rewrites what it is given as CSS
    )
    page.has_launched = True  # else gradio looks at no path of a mounted page at all
    return Doors(app, uploads, hosts)
