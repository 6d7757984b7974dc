//! The hub's door: who stands before it, how long, how often, and what is counted of it.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::Path,
    time::{Duration, Instant},
};

use connect_hub::{cluster, limits};
use connect_spec::{
    control::{ErrorCode, FromAgent, FromHub, Nonce, Request},
    encoding::Encoding,
    ids::ServiceId,
    limits::LOGIN_TIMEOUT,
};
use futures_util::{SinkExt as _, StreamExt as _};
use sqlx::{Connection as _, postgres::PgConnection};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::TcpStream,
};
use tokio_tungstenite::{
    client_async,
    tungstenite::{self, Message, http::StatusCode},
};

use crate::{
    client::{Control, Dialer, Workspace, error_code},
    process::HubProcess,
    template::place,
    tunnels::{SERVICE, World, dial, open},
};

/// Options of a hub that believes whoever connects from loopback.
const BEHIND_A_PROXY: [&str; 4] = ["--listen", "127.0.0.1:0", "--trusted-proxy", "127.0.0.1/32"];

/// A connection to speak HTTP on.
struct Http {
    stream: BufReader<TcpStream>,
}

impl Http {
    async fn connect(address: SocketAddr) -> Self {
        Self { stream: BufReader::new(TcpStream::connect(address).await.unwrap()) }
    }

    /// Sends a request; gives the status and the head of the answer, or nothing when the hub has hung up.
    async fn request(&mut self, line: &str, headers: &str) -> Option<(u16, String)> {
        let request = format!("{line} HTTP/1.1\r\nhost: hub\r\n{headers}\r\n");
        self.stream.write_all(request.as_bytes()).await.ok()?;
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if self.stream.read_line(&mut head).await.ok()? == 0 {
                return None;
            }
        }
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        if let Some((_, rest)) = head.to_lowercase().split_once("content-length: ") {
            let length = rest.lines().next().unwrap().parse().unwrap();
            let mut body = vec![0; length];
            self.stream.read_exact(&mut body).await.ok()?;
        }
        Some((status, head))
    }
}

/// A dialer whose connections the hub takes for those of `client`.
fn through_a_proxy(hub: &HubProcess, client: &str) -> Dialer {
    Dialer { forwarded_for: Some(client.to_owned()), ..Dialer::plain(hub.agents) }
}

async fn stored_addresses(data_dir: &Path) -> Vec<String> {
    let options = cluster::connect_options(data_dir, "postgres").unwrap();
    let mut owner = PgConnection::connect_with(&options).await.unwrap();
    sqlx::query_scalar("SELECT DISTINCT last_address FROM connect.agents ORDER BY 1")
        .fetch_all(&mut owner)
        .await
        .unwrap()
}

#[tokio::test]
async fn addresses_are_those_of_clients_where_a_proxy_is_trusted() {
    let (_dir, data_dir) = place().await;
    let hub = HubProcess::start_with(&data_dir, &BEHIND_A_PROXY, |_| ()).await;
    let workspace = Workspace::new();
    let founder = workspace.founder();
    for (client, stored) in [
        ("203.0.113.7", "203.0.113.0/24"),
        // What the client claimed does not count.
        ("198.51.100.1, 192.0.2.77:4711", "192.0.2.0/24"),
        ("2001:db8:1:2::3", "2001:db8:1::/48"),
        ("unknown", "127.0.0.0/24"),
    ] {
        let mut control = through_a_proxy(&hub, client).control().await;
        let create = workspace.create(None);
        let welcome = control.try_log_in(&founder, |login| login.create = Some(create)).await;
        assert!(matches!(welcome, FromHub::Welcome { .. }), "{welcome:?}");
        assert_eq!(stored_addresses(&data_dir).await, [stored]);
    }
    hub.stop().await;

    // Whoever is no proxy is not believed.
    let hub = HubProcess::start(&data_dir).await;
    let mut control = through_a_proxy(&hub, "203.0.113.7").control().await;
    assert!(matches!(control.try_log_in(&founder, |_| ()).await, FromHub::Welcome { .. }));
    assert_eq!(stored_addresses(&data_dir).await, ["127.0.0.0/24"]);
    hub.stop().await;
}

#[tokio::test]
async fn one_address_that_floods_locks_no_other_out() {
    let (_dir, data_dir) = place().await;
    let hub = HubProcess::start_with(&data_dir, &BEHIND_A_PROXY, |_| ()).await;
    let flood = through_a_proxy(&hub, "203.0.113.7");
    let mut sockets = Vec::new();
    let told = loop {
        let request = flood.request("/v1/agent");
        match client_async(request, flood.dial().await).await {
            Ok((socket, _)) => sockets.push(socket),
            Err(tungstenite::Error::Http(response)) => break response,
            Err(other) => panic!("{other}"),
        }
        assert!(sockets.len() < limits::MAX_UNAUTHENTICATED / 2);
    };
    assert_eq!(told.status(), 429);
    assert_eq!(told.headers()["retry-after"], "2");
    // A neighbour of the same network is not the same address.
    for client in ["203.0.113.8", "198.51.100.1"] {
        let workspace = Workspace::new();
        let mut control = through_a_proxy(&hub, client).control().await;
        let create = workspace.create(None);
        let founder = workspace.founder();
        let welcome = control.try_log_in(&founder, |login| login.create = Some(create)).await;
        assert!(matches!(welcome, FromHub::Welcome { .. }), "{welcome:?}");
    }
    // Those who leave make room.
    drop(sockets);
    while client_async(flood.request("/v1/agent"), flood.dial().await).await.is_err() {}
    hub.stop().await;
}

#[tokio::test]
async fn an_address_that_fails_too_often_has_to_wait() {
    let (_dir, data_dir) = place().await;
    let hub = HubProcess::start_with(&data_dir, &BEHIND_A_PROXY, |_| ()).await;
    let workspace = Workspace::new();
    let founder = workspace.founder();
    let guesser = through_a_proxy(&hub, "203.0.113.7");
    let mut early = guesser.control().await;

    let mut guesses = Http::connect(hub.agents).await;
    let mut tries = 0;
    let head = loop {
        let key = "dGhlIHNhbXBsZSBub25jZQ==";
        let headers = format!(
            "x-forwarded-for: 203.0.113.7\r\nupgrade: websocket\r\nconnection: upgrade\r\n\
             sec-websocket-version: 13\r\nsec-websocket-key: {key}\r\n\
             sec-websocket-protocol: connect.v1.binary\r\nauthorization: Ticket {}\r\n",
            "0".repeat(64)
        );
        match guesses.request("GET /v1/tunnel", &headers).await {
            Some((401, _)) => tries += 1,
            Some((429, head)) => break head,
            // Each connection has its time.
            None => guesses = Http::connect(hub.agents).await,
            other => panic!("{other:?}"),
        }
    };
    assert!(tries > limits::FAILURES_AT_ONCE, "{tries}");
    let retry_after = head.to_lowercase().split_once("retry-after: ").unwrap().1.to_owned();
    let secs: u64 = retry_after.lines().next().unwrap().parse().unwrap();
    assert!((1..=limits::BAR_TIME.as_secs()).contains(&secs), "{secs}");

    // A socket that was open before is told the same, and when to come again.
    let mut login = founder.login(&early.authority, &early.nonce);
    login.create = Some(workspace.create(None));
    early.send(FromAgent::Login(Box::new(login))).await;
    match early.receive().await {
        FromHub::Error(report) => {
            assert_eq!(report.code, ErrorCode::RateLimited);
            let wait = Duration::from_millis(report.retry_in_ms.unwrap().into());
            assert!(wait > Duration::ZERO && wait <= limits::BAR_TIME, "{wait:?}");
        }
        other => panic!("{other:?}"),
    }
    // Nobody else is concerned.
    let mut other = through_a_proxy(&hub, "203.0.113.8").control().await;
    let create = workspace.create(None);
    let welcome = other.try_log_in(&founder, |login| login.create = Some(create)).await;
    assert!(matches!(welcome, FromHub::Welcome { .. }), "{welcome:?}");
    hub.stop().await;
}

#[tokio::test]
async fn whoever_does_not_authenticate_is_cut_off_whatever_is_sent_meanwhile() {
    let (_dir, data_dir) = place().await;
    let hub = HubProcess::start(&data_dir).await;
    let pause = Duration::from_millis(100);
    let start = Instant::now();
    let requests = async {
        let mut http = Http::connect(hub.agents).await;
        while let Some((status, _)) = http.request("GET /", "").await {
            assert_eq!(status, 404);
            tokio::time::sleep(pause).await;
        }
        start.elapsed()
    };
    let trickle = async {
        let mut stream = TcpStream::connect(hub.agents).await.unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nx: ").await.unwrap();
        while stream.write_all(b"y").await.is_ok() {
            tokio::time::sleep(pause).await;
        }
        start.elapsed()
    };
    let silence = async {
        let mut stream = TcpStream::connect(hub.agents).await.unwrap();
        assert_eq!(stream.read(&mut [0; 64]).await.unwrap_or(0), 0);
        start.elapsed()
    };
    let pings = async {
        let mut control = Control::connect(hub.agents).await;
        while control.socket.send(Message::Ping(b"x"[..].into())).await.is_ok() {
            tokio::time::sleep(pause).await;
        }
        start.elapsed()
    };
    let (requests, trickle, silence, pings) = tokio::join!(requests, trickle, silence, pings);
    let slack = Duration::from_secs(4);
    for lasted in [requests, trickle, silence] {
        assert!(lasted < limits::ENTRY_LIMIT + slack, "{lasted:?}");
    }
    assert!(pings < LOGIN_TIMEOUT + limits::FAREWELL_LIMIT + slack, "{pings:?}");
    // Health checks may use one connection for long.
    let mut admin = Http::connect(hub.admin).await;
    assert_eq!(admin.request("GET /healthz", "").await.map(|(status, _)| status), Some(200));
    hub.stop().await;
}

#[tokio::test]
async fn bodies_are_bounded() {
    let (_dir, data_dir) = place().await;
    let hub = HubProcess::start(&data_dir).await;
    for (headers, status) in [
        (format!("content-length: {}\r\n", limits::MAX_BODY_BYTES + 1), 413),
        ("content-length: 9223372036854775807\r\n".to_owned(), 413),
        ("transfer-encoding: chunked\r\n".to_owned(), 411),
    ] {
        for address in [hub.agents, hub.admin] {
            let mut http = Http::connect(address).await;
            let (answered, head) = http.request("POST /v1/agent", &headers).await.unwrap();
            assert_eq!(answered, status, "{headers}");
            assert!(head.contains("connection: close"), "{head}");
        }
    }
    hub.stop().await;
}

/// The samples of an exposition in OpenMetrics text, by name and labels. Every line is one of the format.
fn parse_metrics(text: &str) -> BTreeMap<String, f64> {
    let body = text.strip_suffix("# EOF\n").expect("it ends");
    let mut samples = BTreeMap::new();
    let mut family = "";
    for line in body.lines() {
        if let Some(rest) = line.strip_prefix("# ") {
            let (kind, rest) = rest.split_once(' ').unwrap();
            assert!(["HELP", "TYPE", "UNIT"].contains(&kind), "{line}");
            family = rest.split(' ').next().unwrap();
            continue;
        }
        let (name, value) = line.rsplit_once(' ').unwrap();
        assert!(name.starts_with(family), "{name} is not of {family}");
        let bare = name.split('{').next().unwrap();
        assert!(bare.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_'), "{line}");
        assert!(samples.insert(name.to_owned(), value.parse().unwrap()).is_none(), "{line} twice");
    }
    samples
}

#[tokio::test]
async fn metrics_count_what_happens_and_name_nobody() {
    let (_dir, data_dir) = place().await;
    let mut world = World::start(&data_dir).await;
    let (hub, admin) = (world.hub.agents, world.hub.admin);
    let metrics = async || {
        let mut stream = TcpStream::connect(admin).await.unwrap();
        stream
            .write_all(b"GET /metrics HTTP/1.1\r\nhost: hub\r\nconnection: close\r\n\r\n")
            .await
            .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, text) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.contains("content-type: application/openmetrics-text"), "{head}");
        text.to_owned()
    };
    let before = parse_metrics(&metrics().await);
    assert_eq!(before["connect_hub_tunnels_opened_total"], 0.0);
    assert_eq!(before["connect_hub_relayed_bytes_total{direction=\"from_reacher\"}"], 0.0);

    let (mut reacher, mut exposer) = world.tunnel(Encoding::Binary).await;
    reacher.send(Message::binary(vec![7; 1000])).await.unwrap();
    assert_eq!(exposer.next().await.unwrap().unwrap().len(), 1000);
    // A service that nobody exposes, a ticket that is none, a proof that does not hold.
    let unknown = open(99, ServiceId([1; 16]), world.exposer.id);
    let code = world.reaching.refused(Request::OpenTunnel(unknown)).await;
    assert_eq!(code, ErrorCode::NotFound);
    let subprotocol = Encoding::Binary.subprotocol();
    assert_eq!(dial(&world.dialer, None, subprotocol).await.err(), Some(StatusCode::UNAUTHORIZED));
    let mut wrong = Control::connect(hub).await;
    wrong.nonce = Nonce([0; 32]);
    let refusal = wrong.try_log_in(&world.exposer, |_| ()).await;
    assert_eq!(error_code(refusal), ErrorCode::Unauthorized);

    let text = metrics().await;
    let now = parse_metrics(&text);
    assert_eq!(now["connect_hub_sessions"], 2.0);
    assert_eq!(now["connect_hub_workspaces_online"], 1.0);
    assert_eq!(now["connect_hub_tunnels{stage=\"open\"}"], 1.0);
    assert_eq!(now["connect_hub_tunnels_opened_total"], 1.0);
    assert_eq!(now["connect_hub_tunnels_refused_total{code=\"not_found\"}"], 1.0);
    for credential in ["login", "ticket"] {
        let name =
            format!("connect_hub_authentication_failures_total{{credential=\"{credential}\"}}");
        assert_eq!(now[&name], 1.0);
    }
    assert_eq!(now["connect_hub_database_up"], 1.0);
    assert_eq!(now["connect_hub_draining"], 0.0);
    let connections =
        |state| now[&format!("connect_hub_database_connections{{state=\"{state}\"}}")];
    assert!(connections("idle") + connections("used") >= 1.0);
    assert!(now["process_resident_memory_bytes"] > 1e6);
    assert!(now["process_open_fds"] > 10.0);
    let version = env!("CARGO_PKG_VERSION");
    assert_eq!(now[&format!("connect_hub_build_info{{version=\"{version}\"}}")], 1.0);
    let (workspace, agent) = (world.workspace.id, world.exposer.id);
    for nobody in [workspace.to_string(), agent.to_string(), SERVICE.to_string(), "127.".to_owned()]
    {
        assert!(!text.contains(&nobody), "{nobody} is in the metrics");
    }

    drop((reacher, exposer));
    loop {
        let after = parse_metrics(&metrics().await);
        if after["connect_hub_tunnels{stage=\"open\"}"] == 0.0 {
            assert!(after["connect_hub_relayed_bytes_total{direction=\"from_reacher\"}"] >= 1000.0);
            break;
        }
    }
    world.hub.stop().await;
}
