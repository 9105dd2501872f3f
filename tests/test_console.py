"""Text is printed at the terminal as it is."""

from simclr_jax.console import say, show_table


def test_no_text_is_taken_for_markup_or_emoji(capsys):
    names = ["12:100:30.jpg", "[/b]", "[bold]x[/bold]"]
    for name in names:
        say(name)
        assert capsys.readouterr().out == f"{name}\n"
        show_table(name, ["class", name], [[name, name]])
        assert capsys.readouterr().out.count(name) == 4
