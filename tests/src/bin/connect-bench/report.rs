//! The figures, their medians and their ratios to the direct way.

use std::{collections::BTreeMap, fmt::Write, time::Duration};

use serde_json::{Value, json};

use crate::usage::machine;

/// What leads to the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Way {
    /// Nothing but the loopback interface.
    Direct,
    /// Two agents and a hub, text frames.
    Base64,
    /// Two agents and a hub, binary frames.
    Binary,
}

impl Way {
    const ALL: [(Self, &str); 3] =
        [(Self::Direct, "direct"), (Self::Base64, "base64"), (Self::Binary, "binary")];
}

/// Key, what it is, and its unit.
const FIGURES: [(&str, &str, &str); 23] = [
    ("up_1", "1 stream, from the reacher", "MB/s"),
    ("down_1", "1 stream, to the reacher", "MB/s"),
    ("up_8", "8 streams, from the reacher", "MB/s"),
    ("down_8", "8 streams, to the reacher", "MB/s"),
    ("cpu_up_1", "CPU, 1 stream, from the reacher", "s/GB"),
    ("cpu_down_1", "CPU, 1 stream, to the reacher", "s/GB"),
    ("cpu_up_8", "CPU, 8 streams, from the reacher", "s/GB"),
    ("cpu_down_8", "CPU, 8 streams, to the reacher", "s/GB"),
    ("rtt_64_p50", "round trip of 64 B, p50", "µs"),
    ("rtt_64_p99", "round trip of 64 B, p99", "µs"),
    ("rtt_64_p999", "round trip of 64 B, p99.9", "µs"),
    ("rtt_16k_p50", "round trip of 16 KiB, p50", "µs"),
    ("rtt_16k_p99", "round trip of 16 KiB, p99", "µs"),
    ("rtt_16k_p999", "round trip of 16 KiB, p99.9", "µs"),
    ("loaded_p50", "round trip of 64 B beside a full stream, p50", "µs"),
    ("loaded_p99", "round trip of 64 B beside a full stream, p99", "µs"),
    ("loaded_bulk", "that full stream, to the reacher", "MB/s"),
    ("connections_1", "new connections, one at a time", "1/s"),
    ("connections_32", "new connections, 32 at once", "1/s"),
    ("memory_idle", "memory, idle", "MiB"),
    ("memory_streams", "memory with idle streams", "MiB"),
    ("memory_stream", "memory of an idle stream", "KiB"),
    ("memory_most", "memory, the most in a round", "MiB"),
];

/// Everything that was measured.
#[derive(Debug)]
pub(crate) struct Report {
    window: Duration,
    rounds: u32,
    idle_streams: u32,
    /// One value for each round.
    values: BTreeMap<(&'static str, Way), Vec<f64>>,
    /// Reads that brought other bytes than were sent.
    pub(crate) corrupt: u64,
}

impl Report {
    pub(crate) fn new(window: Duration, rounds: u32, idle_streams: u32) -> Self {
        Self { window, rounds, idle_streams, values: BTreeMap::new(), corrupt: 0 }
    }

    /// Adds the value of one round.
    pub(crate) fn add(&mut self, figure: &str, way: Way, value: f64) {
        let (key, ..) = FIGURES.iter().find(|(key, ..)| *key == figure).expect("a known figure");
        self.values.entry((key, way)).or_default().push(value);
    }

    fn median(&self, figure: &'static str, way: Way) -> Option<f64> {
        let mut values = self.values.get(&(figure, way))?.clone();
        values.sort_unstable_by(f64::total_cmp);
        let middle = values.len() / 2;
        match values.len() % 2 {
            1 => Some(values[middle]),
            _ => Some((values[middle - 1] + values[middle]) / 2.0),
        }
    }

    /// What was measured, on what, and what became of the bytes.
    fn heading(&self) -> String {
        format!(
            "{}. Medians of {} rounds, {} s for each figure. Corrupt reads: {}.",
            machine(),
            self.rounds,
            self.window.as_secs_f64(),
            self.corrupt
        )
    }

    /// One row for each figure: what it is, direct, and each other way with its ratio to direct.
    fn rows(&self) -> impl Iterator<Item = [String; 6]> + '_ {
        FIGURES.iter().map(|&(key, about, unit)| {
            let value = |way| self.median(key, way).map_or_else(|| "–".to_owned(), number);
            let ratio = |way| match (self.median(key, way), self.median(key, Way::Direct)) {
                (Some(value), Some(direct)) => number(value / direct),
                _ => String::new(),
            };
            [
                format!("{about} ({unit})").replace("idle streams", &self.streams()),
                value(Way::Direct),
                value(Way::Base64),
                ratio(Way::Base64),
                value(Way::Binary),
                ratio(Way::Binary),
            ]
        })
    }

    fn streams(&self) -> String {
        format!("{} idle streams", self.idle_streams)
    }

    pub(crate) fn to_text(&self) -> String {
        let mut text = format!("{}\n\n", self.heading());
        let head = ["", "direct", "base64", "÷ direct", "binary", "÷ direct"].map(str::to_owned);
        for [about, cells @ ..] in std::iter::once(head).chain(self.rows()) {
            let _ = write!(text, "{about:<56}");
            for cell in cells {
                let _ = write!(text, "{cell:>10}");
            }
            text.push('\n');
        }
        text
    }

    pub(crate) fn to_markdown(&self) -> String {
        let mut text = format!("{}\n\n", self.heading());
        text.push_str("| | direct | base64 | ÷ direct | binary | ÷ direct |\n");
        text.push_str("|---|---:|---:|---:|---:|---:|\n");
        for cells in self.rows() {
            let _ = writeln!(text, "| {} |", cells.join(" | "));
        }
        text
    }

    pub(crate) fn to_json(&self) -> Value {
        let figures: Vec<_> = FIGURES
            .iter()
            .map(|&(key, about, unit)| {
                let mut figure = json!({ "figure": key, "about": about, "unit": unit });
                for (way, name) in Way::ALL {
                    if let Some(rounds) = self.values.get(&(key, way)) {
                        let median = self.median(key, way);
                        figure[name] = json!({ "median": median, "rounds": rounds });
                    }
                }
                figure
            })
            .collect();
        json!({
            "machine": machine(),
            "rounds": self.rounds,
            "window_seconds": self.window.as_secs_f64(),
            "idle_streams": self.idle_streams,
            "corrupt": self.corrupt,
            "figures": figures,
        })
    }
}

/// Three digits, or more before the point.
fn number(value: f64) -> String {
    let places = match value.abs() {
        100.0.. => 0,
        10.0.. => 1,
        1.0.. => 2,
        _ => 3,
    };
    format!("{value:.places$}")
}
