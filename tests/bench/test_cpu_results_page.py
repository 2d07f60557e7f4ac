"""docs/cpu_results.md is what the results on file say."""

from support import cpu_results_page


def test_the_page_is_up_to_date():
    assert cpu_results_page.PAGE.read_text(encoding="utf-8") == cpu_results_page.page()


def test_the_ratio_of_int8_errors():
    def row(provider, batch, error):
        told = {"vit_fast_commit": "abc", "model": "vit", "weights": "random"}
        return {"provider": provider, "infer_batch_size": batch, "parity_relative_error": error} | told

    rows = [row("vit_fast-int8", batch, 0.02) for batch in (1, 8, 16)] + [row("vit_fast-prepared", 1, 1e-7)]
    rows += [row("openvino-int8", 1, 0.04), row("openvino-int8", 8, 0.025)]
    assert cpu_results_page.int8_rows("run", rows) == [
        "| run | abc | vit | 1 | random | 2.0 % | 4.0 % | 0.50 | met |\n",
        "| run | abc | vit | 8 | random | 2.0 % | 2.5 % | 0.80 | missed |\n",
    ]
