//! What a terminal can show: colours, its width, and that something takes long.

use std::{
    io::{IsTerminal, Write},
    pin::pin,
    time::Duration,
};

use anstyle::{AnsiColor, Style};
use clap::ColorChoice;

/// What takes longer is shown to take long.
const PATIENCE: Duration = Duration::from_secs(1);
/// Between two frames.
const FRAME: Duration = Duration::from_millis(100);
const FRAMES: [&str; 4] = ["|", "/", "-", "\\"];
/// Back to the beginning of the line, which is emptied (ECMA-48: CR, EL).
const CLEAR: &str = "\r\x1b[K";
/// Between two columns.
const GAP: &str = "  ";
/// Text is not squeezed into less than this, however narrow the terminal is.
const LEAST_ROOM: usize = 20;

pub(crate) const GOOD: Style = AnsiColor::Green.on_default();
pub(crate) const DOUBTFUL: Style = AnsiColor::Yellow.on_default();
pub(crate) const BAD: Style = AnsiColor::Red.on_default();
pub(crate) const FAILURE: Style = AnsiColor::Red.on_default().bold();
pub(crate) const ADVICE: Style = AnsiColor::Cyan.on_default().bold();
const HEADER: Style = Style::new().bold();

/// The `--color` of a command line that may be wrong, for what is said about it.
pub(crate) fn choice_in(args: &[std::ffi::OsString]) -> ColorChoice {
    let args: Vec<_> = args.iter().map(|arg| arg.to_string_lossy()).collect();
    let next = args.iter().position(|arg| arg == "--color").and_then(|at| args.get(at + 1));
    let joined = args.iter().find_map(|arg| arg.strip_prefix("--color="));
    joined.or(next.map(AsRef::as_ref)).and_then(|when| when.parse().ok()).unwrap_or_default()
}

/// Whether to colour: as the user said, else as the environment says (`NO_COLOR`, `CLICOLOR_FORCE`), else on
/// a terminal that can.
pub(crate) fn is_coloured(choice: ColorChoice, stream: &impl IsTerminal) -> bool {
    let is_set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    match choice {
        ColorChoice::Always => true,
        ColorChoice::Never => false,
        ColorChoice::Auto if is_set("NO_COLOR") => false,
        ColorChoice::Auto if std::env::var_os("CLICOLOR_FORCE").is_some_and(|on| on != "0") => true,
        ColorChoice::Auto => {
            stream.is_terminal() && std::env::var_os("TERM").is_some_and(|term| term != "dumb")
        }
    }
}

pub(crate) fn paint(text: &str, style: Style, coloured: bool) -> String {
    if coloured && style != Style::new() {
        format!("{style}{text}{style:#}")
    } else {
        text.to_owned()
    }
}

/// The columns of the terminal on stdout; `None` when it is none: then nothing has to fit.
pub(crate) fn width() -> Option<usize> {
    if !std::io::stdout().is_terminal() {
        return None;
    }
    let told = std::env::var("COLUMNS").ok().and_then(|columns| columns.parse().ok());
    told.filter(|columns| *columns > 0).or_else(|| {
        terminal_size::terminal_size_of(std::io::stdout()).map(|(width, _)| width.0.into())
    })
}

/// The lines of a table, with a header on terminals only: programs read rows. Rows that do not fit are broken
/// between cells, never within one: a name that was cut cannot be typed.
pub(crate) fn lines<const N: usize>(
    header: [&str; N],
    rows: &[[String; N]],
    width: Option<usize>,
    coloured: bool,
    style: impl Fn(&str) -> Style,
) -> Vec<String> {
    let length = |text: &str| text.chars().count();
    let widths: [usize; N] = std::array::from_fn(|column| {
        let header = width.map_or(0, |_| length(header[column]));
        rows.iter().map(|row| length(&row[column])).max().unwrap_or_default().max(header)
    });
    let full = widths.iter().sum::<usize>() + GAP.len() * N.saturating_sub(1);
    if width.is_some_and(|width| full > width) {
        return rows.iter().flat_map(|row| broken(row, width, coloured, &style)).collect();
    }
    let line = |cells: [(&str, Style); N]| {
        let mut line = String::new();
        let mut gap = 0;
        for ((cell, style), width) in cells.into_iter().zip(widths) {
            if !cell.is_empty() {
                line.push_str(&" ".repeat(gap));
                line.push_str(&paint(cell, style, coloured));
                gap = 0;
            }
            gap += width - length(cell) + GAP.len();
        }
        line
    };
    let header = (width.is_some() && !rows.is_empty()).then(|| line(header.map(|h| (h, HEADER))));
    let rows = rows.iter().map(|row| line(row.each_ref().map(|cell| (cell.as_str(), style(cell)))));
    header.into_iter().chain(rows).collect()
}

/// A row whose first cell has a line of its own and whose others fill the next ones.
fn broken<const N: usize>(
    row: &[String; N],
    width: Option<usize>,
    coloured: bool,
    style: &impl Fn(&str) -> Style,
) -> Vec<String> {
    let width = width.unwrap_or(usize::MAX);
    let mut lines: Vec<String> = Vec::new();
    let mut used = width;
    for (column, cell) in row.iter().enumerate().filter(|(_, cell)| !cell.is_empty()) {
        let painted = paint(cell, style(cell), coloured);
        let length = cell.chars().count() + GAP.len();
        if column > 1 && used + length <= width {
            if let Some(line) = lines.last_mut() {
                line.push_str(GAP);
                line.push_str(&painted);
            }
            used += length;
        } else {
            let indent = if column == 0 { "" } else { GAP };
            lines.push(format!("{indent}{painted}"));
            used = length;
        }
    }
    lines
}

/// The lines of a text that begins in a column of the terminal and stays right of it. It is broken between
/// words and never within backticks: what is quoted is there to be typed.
pub(crate) fn beside(column: usize, text: &str, width: Option<usize>) -> Vec<String> {
    let room = width.map_or(usize::MAX, |width| width.saturating_sub(column).max(LEAST_ROOM));
    let mut is_quoted = false;
    let words = text.split(|character| {
        is_quoted ^= character == '`';
        character == ' ' && !is_quoted
    });
    let mut lines: Vec<String> = Vec::new();
    for word in words {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= room => {
                line.push(' ');
                line.push_str(word);
            }
            Some(_) | None => lines.push(word.to_owned()),
        }
    }
    lines
}

/// Waits for something; if it takes long and `shown`, a line of stderr says what.
pub(crate) async fn wait<T>(what: &str, shown: bool, awaited: impl Future<Output = T>) -> T {
    let mut awaited = pin!(awaited);
    if !shown || !std::io::stderr().is_terminal() {
        return awaited.await;
    }
    tokio::select! {
        done = &mut awaited => return done,
        () = tokio::time::sleep(PATIENCE) => {}
    }
    let mut ticks = tokio::time::interval(FRAME);
    let mut frames = FRAMES.iter().cycle();
    let draw = |text: &str| {
        let mut stderr = std::io::stderr();
        // A terminal that went away shows nothing.
        let _ = write!(stderr, "{CLEAR}{text}").and_then(|()| stderr.flush());
    };
    loop {
        tokio::select! {
            done = &mut awaited => {
                draw("");
                return done;
            }
            _ = ticks.tick() => {
                draw(&format!("{} {what} …", frames.next().unwrap_or(&"")));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows() -> [[String; 3]; 2] {
        [["prod-db", "postgres", "online"], ["a-name-that-is-rather-long", "", "offline"]]
            .map(|row| row.map(str::to_owned))
    }

    fn laid_out(width: Option<usize>) -> Vec<String> {
        lines(["NAME", "PROTOCOL", "STATE"], &rows(), width, false, |_| Style::new())
    }

    #[test]
    fn tables_are_aligned_and_rows_only_where_programs_read() {
        let aligned = [
            "prod-db                     postgres  online",
            "a-name-that-is-rather-long            offline",
        ];
        assert_eq!(laid_out(None), aligned);
        let header = "NAME                        PROTOCOL  STATE";
        assert_eq!(laid_out(Some(80)), [header, aligned[0], aligned[1]]);
    }

    #[test]
    fn narrow_terminals_break_rows_and_never_names() {
        for width in [1, 10, 30, 44] {
            let lines = laid_out(Some(width));
            for name in rows().iter().flatten().filter(|name| !name.is_empty()) {
                assert!(
                    lines.iter().any(|line| line.contains(name.as_str())),
                    "{width}: {lines:?}"
                );
            }
            let longest = rows().iter().flatten().map(|cell| cell.len() + 2).max().expect("cells");
            assert!(
                lines.iter().all(|line| line.len() <= width.max(longest)),
                "{width}: {lines:?}"
            );
        }
        assert_eq!(
            laid_out(Some(30)),
            ["prod-db", "  postgres  online", "a-name-that-is-rather-long", "  offline"]
        );
    }

    #[test]
    fn text_beside_a_column_is_broken_between_words_and_not_in_what_is_quoted() {
        let text = "it is open: run `chmod 600 '/srv/a b/agent.key'` to mend it";
        assert_eq!(beside(4, text, None), [text]);
        assert_eq!(beside(4, text, Some(80)), [text]);
        let narrow = ["it is open: run", "`chmod 600 '/srv/a b/agent.key'`", "to mend it"];
        assert_eq!(beside(10, text, Some(30)), narrow);
        assert_eq!(beside(60, text, Some(30)), narrow, "no column is narrower than some words");
        assert_eq!(beside(0, "", Some(30)), [""]);
        assert_eq!(beside(0, "a  b", Some(30)), ["a  b"]);
    }

    #[test]
    fn colours_add_no_width() {
        let plain = laid_out(Some(80));
        let coloured =
            lines(["NAME", "PROTOCOL", "STATE"], &rows(), Some(80), true, |cell| match cell {
                "online" => GOOD,
                _ => Style::new(),
            });
        assert!(coloured[1].contains("\x1b[32monline\x1b[0m"), "{coloured:?}");
        assert_eq!(anstyle_less(&coloured[1]), plain[1]);
    }

    /// Without escape sequences.
    fn anstyle_less(text: &str) -> String {
        let mut parts = text.split('\x1b');
        let first = parts.next().unwrap_or_default().to_owned();
        parts.fold(first, |all, part| all + part.split_once('m').map_or("", |(_, rest)| rest))
    }

    #[test]
    fn choice_is_found_in_lines_that_cannot_be_read() {
        let choice = |line: &str| choice_in(&line.split(' ').map(Into::into).collect::<Vec<_>>());
        assert_eq!(choice("connect --nonsense --color always"), ColorChoice::Always);
        assert_eq!(choice("connect --color=never x"), ColorChoice::Never);
        assert_eq!(choice("connect --color"), ColorChoice::Auto);
        assert_eq!(choice("connect --color=pink"), ColorChoice::Auto);
    }
}
