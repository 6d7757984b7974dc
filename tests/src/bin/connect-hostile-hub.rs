//! A hub that lies: stands between agents and a real hub, and tells one of the lies of
//! `connect_tests::lies`.

use std::{
    io::{self, Write},
    net::SocketAddr,
    path::PathBuf,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use anyhow::{Context, bail};
use clap::Parser;
use connect_crypto::invite::Invite;
use connect_tests::{
    client::Keys,
    home::Home,
    hostile_relay::HostileRelay,
    lies::{Help, Lie, LyingHub, Needs},
    meddle::{GRAMMAR, Meddler, Rule},
    raise_file_limit, runtime,
};
use serde_json::{Value, json};

/// Stand between agents and a hub as a hub that lies would, and see that they do not believe it; or meddle with
/// what passes, and see that nothing comes of it.
///
/// Agents that were set up with `connect init --hub http://LISTEN`, or joined by invites made there, have
/// the liar for their hub. Each thing that comes of the lie is a JSON line on stdout: `told`, `refused` where
/// that can be seen from the hub, `believed` where an agent acts on it. The last line, after SIGINT, is a
/// summary; the exit code is 1 if something was believed.
///
/// Plain HTTP on the loopback interface only: a liar needs no TLS, and has no business elsewhere.
#[derive(Debug, Parser)]
#[command(name = "connect-hostile-hub", version, after_help = examples())]
struct Args {
    /// The real hub.
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:7420")]
    hub: String,
    /// Where agents are to find the liar.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:7422")]
    listen: SocketAddr,
    /// The lie.
    #[arg(long, value_name = "NAME", required_unless_present_any = ["list", "meddle"])]
    lie: Option<Lie>,
    /// Meddle with what passes, in place of a lie; repeatable, the first rule that fits counts (below).
    #[arg(long, value_name = "RULE", conflicts_with_all = ["lie", "list"])]
    meddle: Vec<Rule>,
    /// Home of an agent that works with the hub, or whose keys were stolen; read once, at the start.
    #[arg(long, value_name = "HOME")]
    accomplice: Option<PathBuf>,
    /// Code of an invite that a thief read, for `invite_reused`.
    #[arg(long, value_name = "CODE", env = "CONNECT_INVITE", hide_env_values = true)]
    code: Option<String>,
    /// List the lies and what they need.
    #[arg(long)]
    list: bool,
}

const EXAMPLES: &str = "\
Example:
  connect-hub serve &
  connect-hostile-hub --lie forged_agent &
  export CONNECT_HOME=$(mktemp -d)
  connect init --hub http://127.0.0.1:7422
  connect agents                   lists one agent, and warns of another
  connect expose localhost:22      refuses the forged agent that knocks at once

  connect-hostile-hub --meddle up#4:flip=100 --meddle down#7:twice
                                   the tunnel ends, and the connection goes on in another one";

fn examples() -> String {
    format!("{EXAMPLES}\n\nMeddling, between a real agent and a real hub:\n{GRAMMAR}")
}

fn main() -> ExitCode {
    match run(Args::parse()) {
        Ok(code) => code,
        Err(error) => {
            // Stderr may be gone; the exit code says it too.
            let _ = writeln!(io::stderr(), "error: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// A line on stdout, whole, at once.
fn print(line: &Value) {
    // Who does not read it any more does not want it.
    let _ = writeln!(io::stdout().lock(), "{line}");
}

fn run(args: Args) -> anyhow::Result<ExitCode> {
    if args.list {
        let mut out = io::stdout().lock();
        for lie in Lie::ALL {
            let needs = match lie.needs() {
                Needs::Nothing => "",
                Needs::MaybeAccomplice => " [goes further with --accomplice]",
                Needs::Accomplice => " [needs --accomplice]",
                Needs::Code => " [needs --code]",
            };
            writeln!(out, "{:<28}{}{needs}", lie.name(), lie.about())?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    let hub = hub_address(&args.hub)?;
    if !args.listen.ip().is_loopback() {
        bail!("`{}` is not on the loopback interface", args.listen);
    }
    if !args.meddle.is_empty() {
        return meddle(args.listen, hub, args.meddle);
    }
    let lie = args.lie.context("no lie")?;
    match lie.needs() {
        Needs::Accomplice if args.accomplice.is_none() => bail!("`{lie}` needs --accomplice HOME"),
        Needs::Code if args.code.is_none() => bail!("`{lie}` needs --code CODE"),
        Needs::Nothing | Needs::MaybeAccomplice | Needs::Accomplice | Needs::Code => {}
    }
    let accomplice = match args.accomplice {
        Some(home) if !home.join("membership.json").exists() => {
            bail!("no agent lives in `{}`", home.display())
        }
        Some(home) => Some(Arc::new(Keys::of(&Home::at(home)))),
        None => None,
    };
    let code = args.code.as_deref().map(str::parse::<Invite>).transpose()?.map(Arc::new);
    raise_file_limit();
    runtime().block_on(async {
        let listener = LyingHub::listen(args.listen, hub, |report| print(&report.to_json()));
        let liar = listener.await.with_context(|| format!("cannot listen on `{}`", args.listen))?;
        liar.tell(lie, Help { accomplice, code, ..Help::default() });
        print(&json!({ "lie": lie.name(), "what": "listening", "url": liar.url() }));
        tokio::signal::ctrl_c().await?;
        let summary = liar.summary();
        print(&json!({
            "lie": lie.name(),
            "what": "summary",
            "told": summary.told,
            "refused": summary.refused,
            "believed": summary.believed,
        }));
        Ok(if summary.believed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    })
}

/// Stands between agents and a hub and meddles, until SIGINT.
fn meddle(listen: SocketAddr, hub: SocketAddr, rules: Vec<Rule>) -> anyhow::Result<ExitCode> {
    raise_file_limit();
    let count = Arc::new(AtomicUsize::new(0));
    let counted = count.clone();
    let mut meddler = Meddler::new(rules, move |report| {
        counted.fetch_add(usize::from(report["done"] == true), Ordering::SeqCst);
        print(&report);
    });
    runtime().block_on(async {
        let relay = HostileRelay::listen(listen, hub, move |_, passing| meddler.judge(passing));
        let relay = relay.await.with_context(|| format!("cannot listen on `{listen}`"))?;
        print(&json!({ "what": "listening", "url": relay.url() }));
        tokio::signal::ctrl_c().await?;
        print(&json!({ "what": "summary", "meddled": count.load(Ordering::SeqCst) }));
        Ok(ExitCode::SUCCESS)
    })
}

/// The address in `http://127.0.0.1:7420`.
fn hub_address(url: &str) -> anyhow::Result<SocketAddr> {
    let authority = url.strip_prefix("http://").map(|rest| rest.trim_end_matches('/'));
    let address = authority.map(|authority| authority.replacen("localhost:", "127.0.0.1:", 1));
    let address: Option<SocketAddr> = address.and_then(|address| address.parse().ok());
    address
        .filter(|address| address.ip().is_loopback())
        .with_context(|| format!("`{url}` is not http:// and an address of this machine"))
}
