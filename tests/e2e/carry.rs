//! Bytes from a client to a target and back, through two agents and a hub.

use std::{
    io::{ErrorKind, Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    process::Command,
    sync::{
        Arc, LazyLock,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use connect_tests::{
    PATIENCE, eventually,
    home::{Home, Pair},
    hub::Hub,
    raise_file_limit, random, random_word, runtime,
    services::{Service, Silent, closed_port},
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Two agents for all tests here; each uses services of its own.
static PAIR: LazyLock<Pair> = LazyLock::new(|| Pair::start(Hub::shared()));

fn name() -> String {
    format!("s-{}", random_word())
}

fn carry(target: SocketAddr) -> SocketAddr {
    PAIR.carry(target, &name())
}

fn connect(address: SocketAddr) -> TcpStream {
    let tcp = TcpStream::connect(address).expect("the local port is bound");
    tcp.set_read_timeout(Some(PATIENCE)).expect("our own socket");
    tcp.set_write_timeout(Some(PATIENCE)).expect("our own socket");
    tcp
}

/// Sends, finishes, and reads to the end: the whole of a polite conversation.
fn exchange(address: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let mut tcp = connect(address);
    let mut answer = Vec::new();
    thread::scope(|scope| {
        let mut writer = tcp.try_clone().expect("our own socket");
        scope.spawn(move || {
            writer.write_all(bytes).expect("the tunnel takes it");
            writer.shutdown(Shutdown::Write).expect("our own socket");
        });
        tcp.read_to_end(&mut answer).expect("an answer, and its clean end");
    });
    answer
}

#[test]
fn bytes_come_back_as_they_went() {
    let service = Service::echo();
    let address = carry(service.address());
    for bytes in [&b""[..], b"x", b"hello", &random(40_000)] {
        assert!(exchange(address, bytes) == bytes, "{} bytes", bytes.len());
    }
}

#[test]
fn five_megabytes_go_each_way_unchanged() {
    let service = Service::echo();
    let bytes = random(5 << 20);
    assert!(exchange(carry(service.address()), &bytes) == bytes);
}

#[test]
fn binary_encoding_carries_the_same() {
    let pair = Pair::start_with(Hub::shared(), &["--encoding", "binary"]);
    let service = Service::echo();
    let bytes = random(1 << 20);
    assert!(exchange(pair.carry(service.address(), "service"), &bytes) == bytes);
}

#[test]
fn server_may_speak_first() {
    let service = Service::greeting(b"220 hello\r\n");
    let mut tcp = connect(carry(service.address()));
    let mut banner = [0; 11];
    tcp.read_exact(&mut banner).expect("the banner comes unasked");
    assert_eq!(&banner, b"220 hello\r\n");
    tcp.write_all(b"HELO").expect("the tunnel takes it");
    let mut echoed = [0; 4];
    tcp.read_exact(&mut echoed).expect("the echo");
    assert_eq!(&echoed, b"HELO");
}

#[test]
fn early_bytes_are_never_lost() {
    let service = Service::echo();
    let address = carry(service.address());
    for round in 0..100_u32 {
        let mut tcp = connect(address);
        // Before the exposer can have dialled its target.
        let hello = format!("client speaks first, round {round}");
        tcp.write_all(hello.as_bytes()).expect("the local port takes it");
        let mut echoed = vec![0; hello.len()];
        tcp.read_exact(&mut echoed).expect("the echo");
        assert_eq!(echoed, hello.as_bytes());
    }
}

#[test]
fn client_that_finishes_still_gets_its_answer() {
    let (service, inbox) = Service::answering_at_the_end(b"that was all");
    let bytes = random(100_000);
    assert_eq!(exchange(carry(service.address()), &bytes), b"that was all");
    let received = inbox.received();
    assert_eq!(received.len(), 1);
    assert!(received[0].bytes == bytes && received[0].clean == Some(true));
}

#[test]
fn server_that_finishes_still_gets_the_rest() {
    let (sender, receiver) = std::sync::mpsc::channel();
    let service = Service::start(move |mut tcp| {
        let sender = sender.clone();
        async move {
            let mut all = Vec::new();
            let served = async {
                tcp.write_all(b"goodbye").await?;
                tcp.shutdown().await?;
                tcp.read_to_end(&mut all).await
            };
            // The probe of the exposer goes away before this is over.
            if served.await.is_ok() && !all.is_empty() {
                sender.send(all).expect("the test waits");
            }
        }
    });
    let mut tcp = connect(carry(service.address()));
    let mut goodbye = Vec::new();
    tcp.read_to_end(&mut goodbye).expect("a clean end");
    assert_eq!(goodbye, b"goodbye");
    let bytes = random(300_000);
    tcp.write_all(&bytes).expect("the other direction is open");
    tcp.shutdown(Shutdown::Write).expect("our own socket");
    assert!(receiver.recv_timeout(PATIENCE).expect("the rest arrives") == bytes);
}

#[test]
fn target_that_refuses_resets_the_client_and_hurts_nobody() {
    let target = closed_port();
    let name = name();
    let address = PAIR.carry(target, &name);
    for _ in 0..3 {
        let started = Instant::now();
        let error = connect(address).read(&mut [0; 1]).expect_err("a reset, no clean end");
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    }
    // The target comes up: the same tunnel serves it.
    let service = Service::start_on(target, |mut tcp| async move {
        let _ = tcp.write_all(b"up").await;
    });
    assert_eq!(exchange(address, b""), b"up");
    drop(service);
}

#[test]
fn target_that_never_answers_is_given_up_in_time() {
    let silent = Silent::start();
    let address = carry(silent.address());
    let started = Instant::now();
    let mut tcp = connect(address);
    tcp.write_all(b"anybody there?").expect("the local port takes it");
    let error = tcp.read(&mut [0; 1]).expect_err("a reset, no clean end");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    let waited = started.elapsed();
    assert!((9..15).contains(&waited.as_secs()), "{waited:?}");
}

#[test]
fn thousand_connections_at_once_all_echo() {
    const CONNECTIONS: u32 = 1000;
    raise_file_limit();
    let service = Service::echo();
    let address = carry(service.address());
    let before = service.accepted();
    let mut clients: Vec<_> = (0..CONNECTIONS).map(|_| connect(address)).collect();
    for (number, tcp) in (0..).zip(&mut clients) {
        tcp.write_all(&u32::to_be_bytes(number)).expect("the tunnel takes it");
    }
    for (number, tcp) in (0..).zip(&mut clients) {
        let mut echoed = [0; 4];
        tcp.read_exact(&mut echoed).unwrap_or_else(|error| panic!("{number}: {error}"));
        assert_eq!(u32::from_be_bytes(echoed), number);
    }
    // All of them were open at the same time.
    assert_eq!(service.accepted() - before, CONNECTIONS as usize);
}

/// Bytes that a process holds.
fn memory_of(id: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{id}/status")).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a process");
    let kilobytes = line.trim().trim_end_matches(" kB");
    kilobytes.parse::<u64>().expect("a number") * 1024
}

#[test]
fn reader_that_stops_holds_up_its_sender_and_nobody_else() {
    const TOTAL: u64 = 256 << 20;
    let hub = Hub::start(&[]);
    let pair = Pair::start(&hub);
    let sent = Arc::new(AtomicU64::new(0));
    let flood = Service::start({
        let sent = sent.clone();
        move |mut tcp| {
            let sent = sent.clone();
            async move {
                // Whoever only knocks gets nothing.
                if tcp.read(&mut [0; 1]).await.unwrap_or(0) == 0 {
                    return;
                }
                let chunk = vec![7; 64 << 10];
                while sent.load(Ordering::SeqCst) < TOTAL {
                    match tcp.write(&chunk).await {
                        Ok(length) => sent.fetch_add(length as u64, Ordering::SeqCst),
                        Err(_) => return,
                    };
                }
            }
        }
    });
    let address = pair.carry(flood.address(), "flood");
    let processes = [hub.id(), pair.exposer_agent.id(), pair.reacher_agent.id()];
    let before = processes.map(memory_of);
    let mut stopped = connect(address);
    stopped.write_all(b"!").expect("the tunnel takes it");

    // Nothing announces that a sender is held up: its count stands still.
    eventually("the flood begins", || sent.load(Ordering::SeqCst) > 0);
    let mut last = (0, Instant::now());
    eventually("the sender is held up", || {
        let now = sent.load(Ordering::SeqCst);
        if now != last.0 {
            last = (now, Instant::now());
        }
        last.1.elapsed() > Duration::from_secs(1)
    });
    let held = sent.load(Ordering::SeqCst);
    assert!(held < 64 << 20, "{held} bytes were taken for a reader that reads nothing");
    for (id, before) in processes.into_iter().zip(before) {
        let grown = memory_of(id).saturating_sub(before);
        assert!(grown < 48 << 20, "process {id} grew by {grown} bytes");
    }

    // Another connection of the same tunnel is served meanwhile.
    let mut other = connect(address);
    other.write_all(b"!").expect("the tunnel takes it");
    let mut some = vec![0; 1 << 20];
    other.read_exact(&mut some).expect("the other one is served");
    assert!(some.iter().all(|byte| *byte == 7));
    drop(other);

    // And the first one goes on when its reader does.
    let mut rest = vec![0; usize::try_from(held).expect("checked above") + (4 << 20)];
    stopped.read_exact(&mut rest).expect("the flood goes on");
    assert!(rest.iter().all(|byte| *byte == 7));
}

#[test]
fn services_and_reachers_do_not_mix() {
    let one = Service::greeting(b"one");
    let two = Service::greeting(b"two");
    let (first, second) = (name(), name());
    let to_one = PAIR.carry(one.address(), &first);
    let to_two = PAIR.carry(two.address(), &second);
    let other: Home = PAIR.workspace.join("other reacher");
    let _agent = other.up();
    let also_to_one = other.reach(&first);
    let also_to_two = other.reach(&second);
    assert_ne!(to_one.port(), also_to_one.port());
    thread::scope(|scope| {
        for (address, banner) in
            [(to_one, "one"), (to_two, "two"), (also_to_one, "one"), (also_to_two, "two")]
        {
            scope.spawn(move || {
                let bytes = random(100_000);
                let expected = [banner.as_bytes(), &bytes].concat();
                assert!(exchange(address, &bytes) == expected, "{address}");
            });
        }
    });
    let listed = other.json(&["services"]);
    for name in [&first, &second] {
        assert!(listed.as_array().expect("a list").iter().any(|s| s["name"] == **name));
    }
}

#[test]
fn reaching_in_the_foreground_serves_until_it_is_stopped() {
    let service = Service::echo();
    let name = name();
    PAIR.exposer().ok(&["expose", &service.address().to_string(), "--name", &name]);
    let home = PAIR.workspace.join("passer-by");
    let mut command: Command = home.command(&["reach", &name]);
    let process = connect_tests::process::Process::spawn("connect reach", &mut command);
    let address = process.stdout_line(|line| line.parse().ok());
    assert_eq!(exchange(address, b"foreground"), b"foreground");
    process.signal(nix::sys::signal::Signal::SIGINT);
    let outcome = process.outcome();
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    assert!(TcpStream::connect(address).is_err(), "the port is free again");
}

#[test]
fn library_hands_out_streams() {
    let service = Service::greeting(b"hello ");
    let name = name();
    PAIR.exposer().ok(&["expose", &service.address().to_string(), "--name", &name]);
    let dir = PAIR.workspace.join("program").dir().to_owned();
    let read = runtime().block_on(async {
        let home = connect_agent::Home::at(&dir);
        let lock = home.try_lock().expect("ours").expect("nobody else holds it");
        assert!(home.try_lock().expect("ours").is_none(), "one home is one agent");
        let agent = connect_agent::Agent::start(home, lock, connect_agent::Options::default())
            .expect("an enrolled home");
        let reached = agent.reach(&name.parse().expect("a name"));
        reached.ready().await.expect("the exposer is online");
        let mut streams = Vec::new();
        for _ in 0..3 {
            streams.push(reached.open().await.expect("a tunnel is up"));
        }
        let mut all = Vec::new();
        for (number, mut stream) in (b'0'..).zip(streams) {
            stream.write_all(&[number]).await.expect("it takes it");
            stream.shutdown().await.expect("one direction ends");
            stream.read_to_end(&mut all).await.expect("a clean end");
        }
        agent.unreach(&name.parse().expect("a name"));
        assert!(reached.open().await.is_err(), "let go of");
        let missing = agent.reach(&"nothing-of-this-name".parse().expect("a name"));
        let error = missing.ready().await.expect_err("there is none");
        assert_eq!(error.kind, connect_agent::ErrorKind::ServiceNotFound);
        agent.stop().await;
        all
    });
    assert_eq!(read, b"hello 0hello 1hello 2");
}

/// The target has said all that it has to say, so only the client's direction is open: its break is no end.
#[test]
fn client_that_vanishes_resets_a_target_that_has_finished() {
    let (sender, receiver) = std::sync::mpsc::channel();
    let service = Service::start(move |mut tcp| {
        let sender = sender.clone();
        async move {
            let mut first = [0; 4];
            // The probe of the exposer brings nothing.
            if tcp.shutdown().await.is_ok() && tcp.read_exact(&mut first).await.is_ok() {
                sender.send(None).expect("the test waits");
                let end = tcp.read(&mut first).await.map_err(|error| error.kind());
                sender.send(Some(end)).expect("the test waits");
            }
        }
    });
    let mut client = connect(carry(service.address()));
    assert_eq!(client.read(&mut [0; 1]).expect("the target's end"), 0);
    client.write_all(b"half").expect("the tunnel takes it");
    assert_eq!(receiver.recv_timeout(PATIENCE), Ok(None));
    let tcp = tokio::net::TcpSocket::from_std_stream(client);
    tcp.set_zero_linger().expect("our own socket");
    drop(tcp);
    let end = receiver.recv_timeout(PATIENCE).expect("the target's connection ends");
    assert_eq!(end, Some(Err(ErrorKind::ConnectionReset)), "a reset is no clean end");
}

#[test]
fn client_that_vanishes_resets_the_target() {
    let (service, inbox) = Service::answering_at_the_end(b"never");
    let address = carry(service.address());
    let mut client = connect(address);
    client.write_all(b"half a request").expect("the tunnel takes it");
    eventually("it arrives", || !inbox.received().is_empty());
    // Unread bytes and a dropped socket would do it, too; this is a reset on purpose.
    let tcp = tokio::net::TcpSocket::from_std_stream(client);
    tcp.set_zero_linger().expect("our own socket");
    drop(tcp);
    eventually("the target's connection ends", || inbox.received()[0].clean.is_some());
    assert_eq!(inbox.received()[0].clean, Some(false), "a reset is no clean end");
}
