//! How fast it is, end to end: two real agents and a real hub, beside the same without them.
//!
//! `load` of the library makes the traffic, `usage` looks at what the processes use, `report` shows it.

mod report;
mod usage;

use std::{
    io::{self, Write},
    net::SocketAddr,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::Context;
use clap::Parser;
use connect_tests::{
    home::Pair,
    hub::Hub,
    load::{Direction, Target},
    raise_file_limit,
};

use report::{Report, Way};
use usage::Processes;

/// Measure how fast connections are through two agents and a hub.
///
/// Everything runs on this machine: a hub with its private database, an exposer and a reacher for each of the
/// two encodings, a target, and its clients. Each figure is measured one way after the other (direct, base64,
/// binary), and again in each round, with processes that are started anew. Shown is the median of the rounds.
/// The exit code is 1 if a byte came that was not sent.
///
/// `connect` and `connect-hub` are those of CONNECT_BIN_DIR, by default those beside this program.
#[derive(Debug, Parser)]
#[command(name = "connect-bench", version)]
struct Args {
    /// Measure each figure for a tenth of a second, with little underway and 100 idle streams: shows that it
    /// works, not how fast.
    #[arg(long)]
    quick: bool,
    /// How often everything is measured.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Print the figures of all rounds as JSON.
    #[arg(long, conflicts_with = "markdown")]
    json: bool,
    /// Print the table as Markdown.
    #[arg(long)]
    markdown: bool,
}

/// How much is measured.
#[derive(Debug, Clone, Copy)]
struct Extent {
    /// How long each figure is measured.
    window: Duration,
    /// Streams that are open for the memory of one.
    idle_streams: u32,
    /// Bytes between the ends of all streams: they have to arrive before a measurement ends, and debug
    /// builds are slow.
    most_underway: u64,
    /// Before memory is read: nobody announces that buffers were given back.
    settle: Duration,
}

const FULL: Extent = Extent {
    window: Duration::from_secs(2),
    idle_streams: 1000,
    most_underway: u64::MAX,
    settle: Duration::from_millis(1500),
};
const QUICK: Extent = Extent {
    window: Duration::from_millis(100),
    idle_streams: 100,
    most_underway: 256 * 1024,
    settle: Duration::from_millis(100),
};

/// Two agents and a hub.
struct Mesh {
    way: Way,
    reached: SocketAddr,
    processes: Processes,
    _pair: Pair,
    /// Last, so that the agents end first.
    _hub: Hub,
}

impl Mesh {
    fn start(way: Way, encoding: &str, target: &Target) -> Self {
        let hub = Hub::start(&["--log", "info"]);
        let pair = Pair::start_logging(&hub, "info", &["--encoding", encoding]);
        let reached = pair.carry(target.address(), "target");
        let processes =
            Processes::new([hub.id(), pair.exposer_agent.id(), pair.reacher_agent.id()]);
        Self { way, reached, processes, _pair: pair, _hub: hub }
    }
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(code) => code,
        Err(error) => {
            say(&format!("error: {error:#}"));
            ExitCode::from(2)
        }
    }
}

/// A line on stderr.
fn say(line: &str) {
    // Who does not read it any more does not want it.
    let _ = writeln!(io::stderr(), "{line}");
}

fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let extent = if args.quick { QUICK } else { FULL };
    raise_file_limit();
    let target = Target::start().context("no target")?;
    let mut report = Report::new(extent.window, args.rounds, extent.idle_streams);
    for round in 1..=args.rounds {
        say(&format!("round {round} of {}", args.rounds));
        measure(&target, extent, &mut report)?;
    }
    let text = if args.json {
        report.to_json().to_string()
    } else if args.markdown {
        report.to_markdown()
    } else {
        report.to_text()
    };
    writeln!(io::stdout(), "{}", text.trim_end())?;
    Ok(if report.corrupt == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// One round, with new processes.
fn measure(target: &Target, extent: Extent, report: &mut Report) -> anyhow::Result<()> {
    let meshes =
        [Mesh::start(Way::Base64, "base64", target), Mesh::start(Way::Binary, "binary", target)];
    // Memory first: what a burst leaves behind would be there already.
    for mesh in &meshes {
        memory(target, mesh, extent, report)?;
    }
    let mut ways = vec![(Way::Direct, target.address(), None)];
    ways.extend(meshes.iter().map(|mesh| (mesh.way, mesh.reached, Some(&mesh.processes))));
    for (name, direction, streams) in [
        ("up_1", Direction::Up, 1),
        ("down_1", Direction::Down, 1),
        ("up_8", Direction::Up, 8),
        ("down_8", Direction::Down, 8),
    ] {
        for (way, via, processes) in &ways {
            let bulk = target.bulk(*via, direction, streams, extent.most_underway)?;
            thread::sleep(extent.window / 4);
            let cpu = || processes.map(Processes::cpu_seconds).transpose();
            let before = cpu()?;
            let (bytes, elapsed) = bulk.measure(extent.window)?;
            let after = cpu()?;
            report.corrupt += bulk.finish().with_context(|| format!("{name}, {way:?}"))?;
            let megabytes = mega(bytes);
            report.add(name, *way, megabytes / elapsed.as_secs_f64());
            if let (Some(before), Some(after)) = (before, after) {
                report.add(&format!("cpu_{name}"), *way, (after - before) / megabytes * 1000.0);
            }
        }
    }
    for (name, size) in [("rtt_64", 64), ("rtt_16k", 16 * 1024)] {
        for (way, via, _) in &ways {
            let times = target.echo(*via, size)?.round_trips(extent.window)?;
            for (part, label) in [(0.5, "p50"), (0.99, "p99"), (0.999, "p999")] {
                report.add(&format!("{name}_{label}"), *way, micros(percentile(&times, part)));
            }
        }
    }
    for (way, via, _) in &ways {
        let mut echo = target.echo(*via, 64)?;
        let bulk = target.bulk(*via, Direction::Down, 1, extent.most_underway)?;
        thread::sleep(extent.window / 4);
        let (before, start) = (bulk.received(), Instant::now());
        let times = echo.round_trips(extent.window)?;
        let rate = mega(bulk.received() - before) / start.elapsed().as_secs_f64();
        drop(echo);
        report.corrupt += bulk.finish().with_context(|| format!("loaded, {way:?}"))?;
        report.add("loaded_p50", *way, micros(percentile(&times, 0.5)));
        report.add("loaded_p99", *way, micros(percentile(&times, 0.99)));
        report.add("loaded_bulk", *way, rate);
    }
    for (name, at_once) in [("connections_1", 1), ("connections_32", 32)] {
        for (way, via, _) in &ways {
            report.add(name, *way, target.connections(*via, at_once, extent.window)?);
        }
    }
    for mesh in &meshes {
        report.add("memory_most", mesh.way, mesh.processes.most_memory()? / 1024.0);
    }
    Ok(())
}

/// What the processes hold when nothing happens, and what an idle stream adds.
fn memory(target: &Target, mesh: &Mesh, extent: Extent, report: &mut Report) -> anyhow::Result<()> {
    // The first connection brings the channel up.
    drop(target.rest(mesh.reached)?);
    target.wait_until_idle()?;
    thread::sleep(extent.settle);
    let idle = mesh.processes.memory()?;
    let streams: io::Result<Vec<_>> =
        (0..extent.idle_streams).map(|_| target.rest(mesh.reached)).collect();
    let streams = streams?;
    thread::sleep(extent.settle);
    let with_streams = mesh.processes.memory()?;
    drop(streams);
    target.wait_until_idle()?;
    report.add("memory_idle", mesh.way, idle / 1024.0);
    report.add("memory_streams", mesh.way, with_streams / 1024.0);
    report.add("memory_stream", mesh.way, (with_streams - idle) / f64::from(extent.idle_streams));
    Ok(())
}

/// 10⁶ bytes.
fn mega(bytes: u64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "a measurement is not that exact")]
    let bytes = bytes as f64;
    bytes / 1e6
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

/// The time that this part of all did not take longer than. `times` are ascending, and at least one.
fn percentile(times: &[Duration], part: f64) -> Duration {
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a place in a list that is in memory"
    )]
    let rank = (times.len() as f64 * part).ceil() as usize;
    times[rank.clamp(1, times.len()) - 1]
}
