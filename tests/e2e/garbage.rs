//! Whatever is thrown at a WebSocket of the hub ends that connection, with a code, and no other.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
};

use connect_spec::{
    control::{AGENT_PATH, SessionKind, TUNNEL_PATH, close},
    encoding::Encoding,
};
use connect_tests::{
    PATIENCE,
    client::{Client, Keys, data_socket, tickets},
    home::{Pair, Workspace},
    hub::Hub,
    random, runtime,
    services::Service,
};
use tokio::io::AsyncWriteExt;
use tokio_tungstenite::tungstenite::Message;

/// A tunnel that is in use while others misbehave.
struct Bystander {
    _pair: Pair,
    _service: Service,
    client: TcpStream,
}

impl Bystander {
    fn start() -> Self {
        let pair = Pair::start(Hub::shared());
        let service = Service::echo();
        let client = TcpStream::connect(pair.carry(service.address(), "svc")).expect("bound");
        client.set_read_timeout(Some(PATIENCE)).expect("our own socket");
        let mut bystander = Self { _pair: pair, _service: service, client };
        bystander.check_unharmed();
        bystander
    }

    #[track_caller]
    fn check_unharmed(&mut self) {
        let bytes = random(1000);
        self.client.write_all(&bytes).expect("the tunnel takes it");
        let mut echoed = vec![0; bytes.len()];
        self.client.read_exact(&mut echoed).expect("the same connection goes on");
        assert!(echoed == bytes);
    }
}

fn hub() -> SocketAddr {
    Hub::shared().address()
}

/// One WebSocket frame, masked with zeros; `claimed` is the length that its header states.
fn frame(first: u8, claimed: u64, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![first];
    match u16::try_from(claimed) {
        Ok(short @ 0..126) => frame.push(0x80 | u8::try_from(short).expect("under 126")),
        Ok(medium) => {
            frame.push(0x80 | 126);
            frame.extend(medium.to_be_bytes());
        }
        Err(_) => {
            frame.push(0x80 | 127);
            frame.extend(claimed.to_be_bytes());
        }
    }
    frame.extend([0; 4]);
    frame.extend(payload);
    frame
}

/// Sends raw bytes on a control socket, logged in or not; the code with which the hub closes.
fn raw_on_control(keys: Option<&Keys>, bytes: &[u8]) -> Option<u16> {
    runtime().block_on(async {
        let client = match keys {
            Some(keys) => Client::login(hub(), keys, SessionKind::Command).await,
            None => Client::dial(hub()).await,
        };
        let mut tcp = client.into_tcp();
        tcp.write_all(bytes).await.expect("the hub reads");
        let mut tcp = tcp.into_std().expect("our own socket");
        tcp.set_nonblocking(false).expect("our own socket");
        close_code(&mut tcp)
    })
}

/// Reads unmasked frames to a close frame; its code.
fn close_code(tcp: &mut TcpStream) -> Option<u16> {
    tcp.set_read_timeout(Some(PATIENCE)).expect("our own socket");
    loop {
        let mut head = [0; 2];
        tcp.read_exact(&mut head).ok()?;
        let length = match head[1] {
            126 => {
                let mut length = [0; 2];
                tcp.read_exact(&mut length).ok()?;
                u16::from_be_bytes(length).into()
            }
            length => usize::from(length),
        };
        let mut payload = vec![0; length];
        tcp.read_exact(&mut payload).ok()?;
        if head[0] & 0xf == 8 {
            return Some(u16::from_be_bytes([*payload.first()?, *payload.get(1)?]));
        }
    }
}

#[test]
fn garbage_on_a_control_socket_closes_it_with_a_code() {
    let mut bystander = Bystander::start();
    let keys = Keys::of(&Workspace::found(Hub::shared()).founder);
    let huge =
        format!(r#"{{"type":"request","id":1,"request":{{"do":"{}"}}}}"#, "x".repeat(70_000));
    let huge = huge.as_bytes();
    let length = |bytes: &[u8]| u64::try_from(bytes.len()).expect("small");
    for (what, bytes, expected) in [
        ("reserved bits", frame(0xf1, 1, b"x"), close::PROTOCOL),
        ("an unknown opcode", frame(0x83, 1, b"x"), close::PROTOCOL),
        ("a continuation of nothing", frame(0x80, 1, b"x"), close::PROTOCOL),
        ("an unmasked frame", vec![0x81, 1, b'x'], close::PROTOCOL),
        ("a long ping", frame(0x89, 126, &[0; 126]), close::PROTOCOL),
        ("text that is not UTF-8", frame(0x81, 2, b"\xff\xfe"), close::PROTOCOL),
        ("a header of 100 MiB", frame(0x81, 100 << 20, b"x"), close::TOO_BIG),
        ("a header of 2^63 bytes", frame(0x81, 1 << 63, b""), close::TOO_BIG),
        ("huge text", frame(0x81, length(huge), huge), close::TOO_BIG),
        ("binary", frame(0x82, 4, b"\0\x01\x02\x03"), close::UNSUPPORTED),
        ("no JSON", frame(0x81, 5, b"hello"), close::BAD_REQUEST),
        ("an empty text", frame(0x81, 0, b""), close::BAD_REQUEST),
    ] {
        for keys in [None, Some(&keys)] {
            let code = raw_on_control(keys, &bytes);
            assert_eq!(code, Some(expected), "{what}, logged in: {}", keys.is_some());
        }
        bystander.check_unharmed();
    }
    for _ in 0..10 {
        // Noise may look like the start of a long frame, so the end of it is ours.
        let noise = [random(300), frame(0xf1, 1, b"x")].concat();
        runtime().block_on(async {
            let mut tcp = Client::dial(hub()).await.into_tcp();
            tcp.write_all(&noise).await.expect("the hub reads");
        });
    }
    bystander.check_unharmed();
}

#[test]
fn json_of_the_wrong_shape_closes_a_control_socket() {
    let mut bystander = Bystander::start();
    let keys = Keys::of(&Workspace::found(Hub::shared()).founder);
    let deep = format!(r#"{{"type":"request","id":1,"request":{}}}"#, "[".repeat(30_000));
    for text in [
        "null",
        "[]",
        "{}",
        "1e999",
        r#"{"type":"nonsense"}"#,
        r#"{"type":"login"}"#,
        r#"{"type":"request","id":-1,"request":{"do":"services"}}"#,
        r#"{"type":"request","id":1,"request":{"do":"drop_tables"}}"#,
        r#"{"type":"request","id":1,"request":{"do":"lookup","tag":"zz"}}"#,
        r#"{"type":"request","id":1,"request":{"do":"lookup","tag":"00"}}"#,
        r#"{"type":"request","id":1,"request":{"do":"services","after":7}}"#,
        r#"{"type":"accept_tunnel","tunnel_id":"00","message":"!"}"#,
        r#"{"type":"challenge","version":1,"nonce":"00"}"#,
        &deep,
    ] {
        runtime().block_on(async {
            for logged_in in [false, true] {
                let mut client = match logged_in {
                    true => Client::login(hub(), &keys, SessionKind::Command).await,
                    false => Client::dial(hub()).await,
                };
                client.send_raw(Message::text(text)).await;
                let code = client.close_code().await;
                let start: String = text.chars().take(60).collect();
                assert_eq!(code, Some(close::BAD_REQUEST), "{start}, logged in: {logged_in}");
            }
        });
    }
    bystander.check_unharmed();
}

#[test]
fn half_a_frame_and_half_a_head_hold_up_nobody() {
    let mut bystander = Bystander::start();
    let mut kept = Vec::new();
    for _ in 0..20 {
        runtime().block_on(async {
            let mut tcp = Client::dial(hub()).await.into_tcp();
            tcp.write_all(&[0x81, 0xfe, 0x10]).await.expect("the hub reads");
            kept.push(tcp);
        });
        let mut half = TcpStream::connect(hub()).expect("the hub listens");
        half.write_all(format!("GET {AGENT_PATH} HTTP/1.1\r\nHost: ").as_bytes())
            .expect("it reads");
        bystander.check_unharmed();
    }
    // Nobody may occupy the hub for ever: what never finishes its frame is closed at the login limit.
    let first = kept.remove(0).into_std().expect("our own socket");
    first.set_nonblocking(false).expect("our own socket");
    let code = close_code(&mut { first });
    assert!(matches!(code, Some(close::TIMEOUT) | None), "{code:?}");
    bystander.check_unharmed();
}

#[test]
fn garbage_on_a_data_socket_ends_that_tunnel_and_tells_the_other_end() {
    let mut bystander = Bystander::start();
    let workspace = Workspace::found(Hub::shared());
    let (exposer, reacher) = (Keys::of(&workspace.founder), Keys::of(&workspace.join("other")));
    for (what, bytes, expected) in [
        ("a header of 100 MiB", frame(0x81, 100 << 20, b"x"), close::TOO_BIG),
        ("a header of 2^63 bytes", frame(0x81, 1 << 63, b""), close::TOO_BIG),
        ("the wrong encoding", frame(0x82, 1, b"x"), close::UNSUPPORTED),
        ("reserved bits", frame(0xf1, 1, b"x"), close::PROTOCOL),
        ("an unknown opcode", frame(0x83, 1, b"x"), close::PROTOCOL),
        ("an unmasked frame", vec![0x81, 1, b'x'], close::PROTOCOL),
        ("a continuation of nothing", frame(0x80, 1, b"x"), close::PROTOCOL),
        ("a long ping", frame(0x89, 126, &[0; 126]), close::PROTOCOL),
    ] {
        let (mut guilty, mut other) = runtime().block_on(async {
            let (exposers, reachers, _sessions) = tickets(hub(), &exposer, &reacher).await;
            let guilty = data_socket(hub(), &reachers, Encoding::Base64).await.expect("admitted");
            let other = data_socket(hub(), &exposers, Encoding::Base64).await.expect("admitted");
            let mut guilty = guilty.into_inner();
            guilty.write_all(&bytes).await.expect("the hub reads");
            let blocking = |tcp: tokio::net::TcpStream| {
                let tcp = tcp.into_std().expect("our own socket");
                tcp.set_nonblocking(false).map(|()| tcp).expect("our own socket")
            };
            (blocking(guilty), blocking(other.into_inner()))
        });
        assert_eq!(close_code(&mut guilty), Some(expected), "{what}");
        assert_eq!(close_code(&mut other), Some(close::PEER_GONE), "{what}");
        bystander.check_unharmed();
    }
}

/// What the hub answers to a request.
fn http(request: &str) -> String {
    let mut tcp = TcpStream::connect(hub()).expect("the hub listens");
    tcp.set_read_timeout(Some(PATIENCE)).expect("our own socket");
    tcp.write_all(request.as_bytes()).expect("the hub reads");
    let mut answer = vec![0; 4096];
    let length = tcp.read(&mut answer).unwrap_or(0);
    String::from_utf8_lossy(&answer[..length]).lines().next().unwrap_or_default().to_owned()
}

#[test]
fn requests_that_are_no_upgrade_are_refused() {
    let upgrade = "Host: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n";
    let check = |request: &str, expected: &str| {
        let status = http(request);
        assert!(status.starts_with(&format!("HTTP/1.1 {expected}")), "{request:?}: {status}");
    };
    for path in [AGENT_PATH, TUNNEL_PATH] {
        check(&format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n"), "426");
        check(&format!("POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"), "405");
        check(&format!("GET {path} HTTP/1.1\r\n{upgrade}Sec-WebSocket-Version: 12\r\n\r\n"), "426");
        check(
            &format!(
                "GET {path} HTTP/1.1\r\n{upgrade}Sec-WebSocket-Version: 13\r\n\
                 Sec-WebSocket-Key: short\r\n\r\n"
            ),
            "400",
        );
        check(&format!("GET {path}?ticket=1 HTTP/1.1\r\nHost: x\r\n\r\n"), "426");
    }
    check("GET / HTTP/1.1\r\nHost: x\r\n\r\n", "404");
    check("GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n", "404");
    check("GET /v1/agent/../agent HTTP/1.1\r\nHost: x\r\n\r\n", "404");
    check("\x16\x03\x01\x02\x00\x01\x00\x01\r\n\r\n", "400");
    check(&format!("GET {AGENT_PATH} HTTP/1.1\r\nx: {}\r\n\r\n", "y".repeat(20_000)), "431");
}
