//! By hand: how well a tenant is served while strangers flood the hub.
//!
//!     connect-flood --hub 10.0.0.1:7420 --tenant 127.0.0.1:9000 --hub-pid PID
//!
//! The tenant is a reached service that echoes. It is measured alone; then with `--hold` sockets that say
//! nothing and are opened again whenever the hub cuts them, and `--opens` more a second that are closed
//! after a moment. Loopback has no limit of its own at the hub: dial it by another address of this machine.
//!
//! With `--asks`, agents of another workspace ask for so many tunnels a second meanwhile, and their exposer
//! refuses each. They come by hand-made clients, for which the hub has to be on loopback and open for
//! registration, and `CONNECT_BIN_DIR` to name the directory of `connect`.

#![allow(clippy::print_stdout, reason = "a program that prints what it measures")]

use std::{
    fs,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use connect_spec::{
    control::{ErrorCode, FromAgent, FromHub, Reply, Request, SessionKind},
    ids::{AgentId, LookupTag, ServiceId},
};
use connect_tests::{
    client::{Client, Keys, sealed, tunnel_request},
    home::Workspace,
    raise_file_limit,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
    time::{MissedTickBehavior, interval, sleep, timeout},
};

#[derive(Debug, Parser)]
struct Options {
    /// Where agents are served.
    #[arg(long)]
    hub: SocketAddr,
    /// Local address of a reached service that echoes.
    #[arg(long)]
    tenant: SocketAddr,
    /// Process of the hub, for its memory.
    #[arg(long)]
    hub_pid: u32,
    /// Sockets that say nothing.
    #[arg(long, default_value_t = 10_000)]
    hold: usize,
    /// Further connections a second.
    #[arg(long, default_value_t = 1000)]
    opens: u32,
    /// Tunnels that another workspace asks for, a second.
    #[arg(long, default_value_t = 0)]
    asks: u32,
    /// Seconds of each measurement.
    #[arg(long, default_value_t = 20)]
    secs: u64,
}

#[derive(Debug, Default)]
struct Counts {
    connected: AtomicU64,
    failed: AtomicU64,
    open: AtomicU64,
    asked: AtomicU64,
    limited: AtomicU64,
    stop: AtomicBool,
}

#[tokio::main]
async fn main() -> Result<()> {
    let options = Options::parse();
    raise_file_limit();
    let mut tenant = TcpStream::connect(options.tenant).await.context("the tenant's service")?;
    tenant.set_nodelay(true)?;
    let time = Duration::from_secs(options.secs);

    println!("alone:       {}", measure(&mut tenant, time).await?);
    println!("hub memory:  {}", memory(options.hub_pid)?);
    let counts = Arc::new(Counts::default());
    let mut flood = JoinSet::new();
    // Before the strangers, who leave no room for a login on loopback.
    if options.asks > 0 {
        neighbours(options.hub, options.asks, &counts, &mut flood).await;
    }
    for _ in 0..options.hold {
        flood.spawn(hold(options.hub, counts.clone()));
    }
    flood.spawn(open(options.hub, options.opens, counts.clone()));
    println!("under flood: {}", measure(&mut tenant, time).await?);
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    println!(
        "strangers:   {} sockets open now, {} connections made, {} failed",
        count(&counts.open),
        count(&counts.connected),
        count(&counts.failed)
    );
    println!(
        "neighbours:  {} tunnels asked for, {} over a limit",
        count(&counts.asked),
        count(&counts.limited)
    );
    println!("hub memory:  {}", memory(options.hub_pid)?);
    counts.stop.store(true, Ordering::Relaxed);
    flood.shutdown().await;
    sleep(Duration::from_secs(2)).await;
    println!("afterwards:  {}", measure(&mut tenant, time / 4).await?);
    println!("hub memory:  {}", memory(options.hub_pid)?);
    Ok(())
}

/// A stranger that says nothing for as long as it may, again and again.
async fn hold(hub: SocketAddr, counts: Arc<Counts>) {
    while !counts.stop.load(Ordering::Relaxed) {
        if let Ok(Ok(mut stream)) = timeout(Duration::from_secs(10), TcpStream::connect(hub)).await
        {
            counts.connected.fetch_add(1, Ordering::Relaxed);
            counts.open.fetch_add(1, Ordering::Relaxed);
            // Until the hub has enough of it.
            let _ = stream.read(&mut [0; 16]).await;
            counts.open.fetch_sub(1, Ordering::Relaxed);
        } else {
            counts.failed.fetch_add(1, Ordering::Relaxed);
        }
        // 10,000 of them make another thousand connections a second at most.
        sleep(Duration::from_secs(10)).await;
    }
}

/// So many further connections a second.
async fn open(hub: SocketAddr, per_sec: u32, counts: Arc<Counts>) {
    let mut ticks = interval(Duration::from_secs(1) / per_sec.max(1));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let mut opened = JoinSet::new();
    loop {
        ticks.tick().await;
        let counts = counts.clone();
        opened.spawn(async move {
            if let Ok(mut stream) = TcpStream::connect(hub).await {
                counts.connected.fetch_add(1, Ordering::Relaxed);
                let _ = stream.write_all(b"GET /v1/agent HTTP/1.1\r\n").await;
                sleep(Duration::from_millis(500)).await;
            } else {
                counts.failed.fetch_add(1, Ordering::Relaxed);
            }
        });
        while opened.try_join_next().is_some() {}
    }
}

/// What the neighbours expose, and no target of theirs is asked for.
const SERVICE: ServiceId = ServiceId([0xf1; 16]);
/// So many of them share the work: one agent alone may ask for a hundred a second.
const NEIGHBOURS: u32 = 10;

/// Founds a workspace whose agents ask one of them for so many tunnels a second.
async fn neighbours(hub: SocketAddr, per_sec: u32, counts: &Arc<Counts>, flood: &mut JoinSet<()>) {
    let workspace = Workspace::found_at(&format!("http://{hub}"));
    let exposer = Keys::of(&workspace.founder);
    let responder = exposer.agent_id;
    let mut client = Client::login(hub, &exposer, SessionKind::Agent).await;
    let tag = LookupTag([0xf1; 16]);
    let expose = Request::Expose { service_id: SERVICE, tag, record: sealed(1), take_over: false };
    assert_eq!(client.request(expose).await, Reply::Done);
    flood.spawn(async move {
        while let Some(message) = client.next().await {
            if let FromHub::IncomingTunnel { request, .. } = message {
                let (tunnel_id, code) = (request.tunnel_id, ErrorCode::Refused);
                client.send(&FromAgent::RefuseTunnel { tunnel_id, code }).await;
            }
        }
    });
    for number in 0..NEIGHBOURS {
        let keys = Keys::of(&workspace.join(&format!("neighbour-{number}")));
        flood.spawn(ask(hub, keys, responder, per_sec / NEIGHBOURS, counts.clone()));
    }
}

/// An agent that asks for so many tunnels a second, one after the other.
async fn ask(hub: SocketAddr, keys: Keys, responder: AgentId, per_sec: u32, counts: Arc<Counts>) {
    let mut client = Client::login(hub, &keys, SessionKind::Agent).await;
    let mut ticks = interval(Duration::from_secs(1) / per_sec.max(1));
    loop {
        ticks.tick().await;
        let reply = client.request(Request::OpenTunnel(tunnel_request(SERVICE, responder))).await;
        counts.asked.fetch_add(1, Ordering::Relaxed);
        if matches!(&reply, Reply::Error(report)
            if matches!(report.code, ErrorCode::RateLimited | ErrorCode::Busy))
        {
            counts.limited.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Round trips of 64 bytes through the tenant's tunnel, a hundred a second.
async fn measure(tenant: &mut TcpStream, time: Duration) -> Result<String> {
    let mut trips = Vec::new();
    let mut ticks = interval(Duration::from_millis(10));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let start = Instant::now();
    while start.elapsed() < time {
        ticks.tick().await;
        let sent = Instant::now();
        tenant.write_all(&[7; 64]).await.context("the tenant's tunnel")?;
        let mut received = [0; 64];
        tenant.read_exact(&mut received).await.context("the tenant's tunnel")?;
        ensure!(received == [7; 64], "a byte was changed");
        trips.push(sent.elapsed());
    }
    trips.sort();
    let at = |percent: usize| trips[(trips.len() - 1) * percent / 100];
    Ok(format!(
        "{} round trips, p50 {:?}, p99 {:?}, longest {:?}",
        trips.len(),
        at(50),
        at(99),
        at(100)
    ))
}

fn memory(pid: u32) -> Result<String> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).context("the hub's process")?;
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    Ok(resident.context("no figure")?.trim().to_owned())
}
