//! Servers that say exactly these bytes: the outside world, case by case. The real ones are in `tests/e2e`.

use std::future::Future;

use tokio::net::TcpListener;

use super::*;

/// Serves each connection with `serve`, at a port that means nothing.
async fn served<F, S>(serve: S) -> Target
where
    F: Future<Output = ()> + Send + 'static,
    S: Fn(TcpStream) -> F + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let target = listener.local_addr().unwrap().to_string().parse().unwrap();
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            tokio::spawn(serve(tcp));
        }
    });
    target
}

/// Greets with these bytes and keeps the connection.
async fn greeting(bytes: &'static [u8]) -> Target {
    served(move |mut tcp| async move {
        let _ = tcp.write_all(bytes).await;
        let mut rest = Vec::new();
        let _ = tcp.read_to_end(&mut rest).await;
    })
    .await
}

/// Answers whatever begins so with these bytes, and what does not with silence.
async fn answering(answers: &'static [(&'static [u8], &'static [u8])]) -> Target {
    served(move |mut tcp| async move {
        let mut part = [0; 1024];
        while let Ok(length @ 1..) = tcp.read(&mut part).await {
            let found = answers.iter().find(|(start, _)| part[..length].starts_with(start));
            if let Some((_, answer)) = found {
                let _ = tcp.write_all(answer).await;
            }
        }
    })
    .await
}

#[track_caller]
fn says(report: &CheckReport, protocol: &str, detail: Option<&str>, warning: Option<&str>) {
    assert_eq!(report.outcome, Outcome::Connected, "{report:?}");
    assert_eq!(report.protocol.as_str(), protocol, "{report:?}");
    let part = |found: &Option<Printable>, part: Option<&str>| match (found, part) {
        (Some(found), Some(part)) => found.as_str().contains(part),
        (None, None) => true,
        _ => false,
    };
    assert!(part(&report.detail, detail), "{report:?}");
    assert!(part(&report.warning, warning), "{report:?}");
    assert!(CheckReport::decode(&report.encode()).as_ref() == Ok(report), "the peer reads it");
}

const SSL_REQUEST: &[u8] = &[0, 0, 0, 8, 4, 0xd2, 0x16, 0x2f];
/// A StartupMessage of protocol 3.0 begins with its length, which is below 256.
const STARTUP: &[u8] = &[0, 0, 0];

#[tokio::test]
async fn servers_that_greet_are_known_by_their_greeting() {
    let check = async |bytes, protocol, detail: Option<&str>| {
        says(&probe(&greeting(bytes).await).await, protocol, detail, None);
    };
    check(b"SSH-2.0-OpenSSH_9.9p1 Debian-3\r\n", "ssh", Some("OpenSSH_9.9p1")).await;
    check(b"SSH-2.0-odd\x1b[2J\r\n", "ssh", Some("odd")).await;
    check(b"220 mail.secret.example ESMTP ready\r\n", "smtp", None).await;
    check(b"220 ProFTPD FTP Server\r\n", "ftp", None).await;
    check(b"+OK POP3 ready\r\n", "pop3", None).await;
    check(b"* OK IMAP4rev1 ready\r\n", "imap", None).await;
    check(b"RFB 003.008\n", "vnc", None).await;
    let unknown = Some("speaks first");
    check(b"220 at your service\r\n", "tcp", unknown).await;
    check(b"hello, stranger\r\n", "tcp", unknown).await;
    check(b"no line break", "tcp", unknown).await;
    check(b"+PONG\r\n", "tcp", unknown).await;
    check(&[0xff; 9000], "tcp", unknown).await;
}

/// Protocol 10, version, thread id, salt, capabilities.
const MYSQL: &[u8] = b"\x4a\0\0\0\x0a8.0.36-0ubuntu0\0\x08\0\0\0saltsalt\0\xff\xf7\x21\x02\0\xff\x81\x15\0\0\0\0\0\0\0\0\0\0moresaltmore\0mysql_native_password\0";

/// Greets as MySQL does, and answers the login with these packets, one after the other. What is said to it
/// is kept.
async fn mysql_server(
    answers: &'static [&'static [u8]],
) -> (Target, tokio::sync::mpsc::UnboundedReceiver<Vec<u8>>) {
    let (kept, said) = tokio::sync::mpsc::unbounded_channel();
    let target = served(move |mut tcp| {
        let kept = kept.clone();
        async move {
            let _ = tcp.write_all(MYSQL).await;
            let mut part = [0; 1024];
            let mut answers = answers.iter();
            loop {
                let length = tcp.read(&mut part).await.unwrap_or(0);
                let _ = kept.send(part[..length].to_vec());
                if length == 0 {
                    return;
                }
                if let Some(answer) = answers.next() {
                    let _ = tcp.write_all(answer).await;
                }
            }
        }
    })
    .await;
    (target, said)
}

const DENIED: &[u8] = b"\x17\0\0\x02\xff\x15\x04#28000Access denied";

/// A connection that ends inside the handshake counts against the machine that it came from; a login that
/// is refused does not.
#[tokio::test]
async fn mysql_is_left_by_a_login_that_it_refuses() {
    let (target, mut said) = mysql_server(&[DENIED]).await;
    says(&probe(&target).await, "mysql", Some("8.0.36-0ubuntu0, asks for a password"), None);
    let login = said.recv().await.unwrap();
    assert_eq!(login[3], 1, "the second packet of the handshake");
    assert!(login.windows(15).any(|part| part == b"\0connect_check\0"));

    // Another way of authentication, as MySQL 8 asks for: answered too.
    const SWITCH: &[u8] = b"\x16\0\0\x02\xfecaching_sha2_password\0";
    const DENIED_LATER: &[u8] = b"\x17\0\0\x04\xff\x15\x04#28000Access denied";
    let (target, mut said) = mysql_server(&[SWITCH, DENIED_LATER]).await;
    says(&probe(&target).await, "mysql", Some("asks for a password"), None);
    said.recv().await.unwrap();
    assert_eq!(said.recv().await.unwrap(), [0, 0, 0, 3], "no password");

    // A user without a name may come in.
    let (target, mut said) = mysql_server(&[b"\x07\0\0\x02\0\0\0\x02\0\0\0"]).await;
    says(&probe(&target).await, "mysql", Some("asks for no password"), None);
    said.recv().await.unwrap();
    assert_eq!(said.recv().await.unwrap(), [1, 0, 0, 0, 1], "COM_QUIT");

    // A knock is as polite, or the health of a database would lock this machine out of it.
    let (target, mut said) = mysql_server(&[DENIED]).await;
    knock(&target, Arc::default()).await.unwrap();
    assert!(said.recv().await.unwrap().len() > 32);
}

#[tokio::test]
async fn mysql_that_does_not_want_this_machine_is_mysql() {
    let check = async |bytes, warning| {
        says(&probe(&greeting(bytes).await).await, "mysql", None, Some(warning));
    };
    check(b"\x2a\0\0\0\xff\x69\x04Host '10.1.2.3' is blocked because of..", "locked out").await;
    check(b"\x2a\0\0\0\xff\x6a\x04Host '10.1.2.3' is not allowed to conn", "does not allow").await;
    check(b"\x16\0\0\0\xff\x10\x04Too many connections", "too many connections").await;
    check(b"\x16\0\0\0\xff\xff\xffsomething else beside", "error 65535").await;
}

#[tokio::test]
async fn postgres_is_well_whatever_it_answers_a_stranger() {
    let check = async |answers, detail: Option<&str>, warning: Option<&str>| {
        says(&probe(&answering(answers).await).await, "postgres", detail, warning);
    };
    let password = Some("asks for a password");
    check(&[(SSL_REQUEST, b"N"), (STARTUP, b"R\0\0\0\x08\0\0\0\x03")], password, None).await;
    check(&[(SSL_REQUEST, b"N"), (STARTUP, b"R\0\0\0\x0c\0\0\0\x05salt")], password, None).await;
    check(
        &[(SSL_REQUEST, b"N"), (STARTUP, b"R\0\0\0\x17\0\0\0\x0aSCRAM-SHA-256\0\0")],
        password,
        None,
    )
    .await;
    check(&[(SSL_REQUEST, b"N"), (STARTUP, b"R\0\0\0\x08\0\0\0\x07")], Some("credentials"), None)
        .await;
    check(
        &[(SSL_REQUEST, b"N"), (STARTUP, b"R\0\0\0\x08\0\0\0\0")],
        Some("asks for no password"),
        None,
    )
    .await;
    // No entry in pg_hba.conf, with an address in it that stays here.
    check(
        &[
            (SSL_REQUEST, b"N"),
            (
                STARTUP,
                b"E\0\0\0\x39SFATAL\0C28000\0Mno pg_hba.conf entry for \"10.1.2.3\"\0\0\0\0\0",
            ),
        ],
        Some("answers"),
        None,
    )
    .await;
    check(
        &[(SSL_REQUEST, b"N"), (STARTUP, b"E\0\0\0\x13SFATAL\0C53300\0\0")],
        None,
        Some("too many connections"),
    )
    .await;
    check(
        &[(SSL_REQUEST, b"N"), (STARTUP, b"E\0\0\0\x13SFATAL\0C57P03\0\0")],
        None,
        Some("starting up"),
    )
    .await;
    // An old one, or one that is full, answers the question after TLS itself.
    check(&[(SSL_REQUEST, b"E\0\0\0\x13SFATAL\0C08P01\0\0")], Some("answers"), None).await;
}

#[tokio::test]
async fn redis_is_well_whatever_it_answers_a_stranger() {
    let check = async |answer: &'static [u8], detail: Option<&str>, warning: Option<&str>| {
        let target = served(move |mut tcp| async move {
            let mut part = [0; 1024];
            while let Ok(length @ 1..) = tcp.read(&mut part).await {
                if part[..length] == *b"PING\r\n" {
                    let _ = tcp.write_all(answer).await;
                }
            }
        })
        .await;
        says(&probe(&target).await, "redis", detail, warning);
    };
    check(b"+PONG\r\n", Some("PING"), None).await;
    check(b"-NOAUTH Authentication required.\r\n", Some("asks for a password"), None).await;
    check(b"-DENIED Redis is running in protected mode\r\n", Some("protected mode"), None).await;
    check(b"-ERR max number of clients reached\r\n", Some("answers"), None).await;
    check(b"-LOADING Redis is loading\r\n", None, Some("not ready")).await;
}

#[tokio::test]
async fn http_is_well_with_any_status() {
    let check = async |answers, detail: &str| {
        says(&probe(&answering(answers).await).await, "http", Some(detail), None);
    };
    check(&[(b"HEAD / HTTP/1.1\r\nHost: 127.0.0.1:", b"HTTP/1.1 200 OK\r\n\r\n")], "HTTP 200")
        .await;
    check(&[(b"HEAD", b"HTTP/1.0 401 Who?\r\n\r\n")], "HTTP 401").await;
    check(&[(b"HEAD", b"HTTP/1.1 503 Later\r\n\r\n")], "HTTP 503").await;
    check(&[(b"HEAD", b"HTTP/1.1 400 Bad\r\n\r\n")], "HTTP 400").await;
    // It answers even to what was asked before HTTP, and is asked next what it is.
    check(
        &[(SSL_REQUEST, b"HTTP/1.1 400 Bad\r\n\r\n"), (b"HEAD", b"HTTP/1.1 204 \r\n\r\n")],
        "HTTP 204",
    )
    .await;
}

#[tokio::test]
async fn mongodb_and_amqp_answer_what_they_are_asked() {
    let target = served(|mut tcp| async move {
        let mut part = [0; 1024];
        while let Ok(length @ 1..) = tcp.read(&mut part).await {
            if length > 16 && part[12..16] == 2013_i32.to_le_bytes() {
                let mut answer = 16_i32.to_le_bytes().to_vec();
                answer.extend(1_i32.to_le_bytes());
                answer.extend_from_slice(&part[4..8]);
                answer.extend(2013_i32.to_le_bytes());
                let _ = tcp.write_all(&answer).await;
            }
        }
    })
    .await;
    says(&probe(&target).await, "mongodb", Some("hello"), None);

    let start: &[(&[u8], &[u8])] = &[(b"AMQP\0\0\x09\x01", b"\x01\0\0\0\0\0\x04\0\x0a\0\x0a\xce")];
    says(&probe(&answering(start).await).await, "amqp", None, None);
    // An older or newer broker names its own version; RabbitMQ does so to whoever speaks something else.
    let other: &[(&[u8], &[u8])] = &[(b"AMQP\0\0\x09\x01", b"AMQP\x03\x01\0\0")];
    says(&probe(&answering(other).await).await, "amqp", None, None);
    let to_all: &[(&[u8], &[u8])] =
        &[(SSL_REQUEST, b"AMQP\0\0\x09\x01"), (b"AMQP", b"\x01\0\0\0\0\0\x04\0\x0a\0\x0a\xce")];
    says(&probe(&answering(to_all).await).await, "amqp", None, None);
}

#[tokio::test]
async fn what_accepts_a_connection_is_never_ill() {
    let hangs_up = served(|tcp| async move { drop(tcp) }).await;
    says(&probe(&hangs_up).await, "tcp", None, Some("closes them at once"));
    let silent = greeting(b"").await;
    says(&probe(&silent).await, "tcp", None, Some("says nothing"));
    // Reads, then hangs up without a word.
    let shy = served(|mut tcp| async move {
        let _ = tcp.read(&mut [0; 10]).await;
    })
    .await;
    says(&probe(&shy).await, "tcp", Some("not known"), None);
    // An echo is none of the protocols, whatever it was asked.
    let echo = served(|mut tcp| async move {
        let (mut read, mut write) = tcp.split();
        let _ = tokio::io::copy(&mut read, &mut write).await;
    })
    .await;
    says(&probe(&echo).await, "tcp", Some("not known"), None);
    // One that says more than anybody wants to hear.
    let flood = served(|mut tcp| async move {
        let _ = tcp.read(&mut [0; 1]).await;
        while tcp.write_all(&[b'x'; 4096]).await.is_ok() {}
    })
    .await;
    says(&probe(&flood).await, "tcp", Some("not known"), None);
    // One that says it slowly.
    let slow = served(|mut tcp| async move {
        while tcp.write_all(b"x").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
    says(&probe(&slow).await, "tcp", Some("speaks first"), None);
    // One that takes a single connection, and refuses afterwards.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let once: Target = listener.local_addr().unwrap().to_string().parse().unwrap();
    tokio::spawn(async move {
        let (mut tcp, _) = listener.accept().await.unwrap();
        drop(listener);
        let _ = tcp.read(&mut [0; 100]).await;
    });
    assert_eq!(probe(&once).await.outcome, Outcome::Connected);
}

#[tokio::test]
async fn what_accepts_no_connection_says_why() {
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let report = probe(&closed.to_string().parse().unwrap()).await;
    assert_eq!((report.outcome, report.resolved), (Outcome::Refused, None));
    let unknown = probe(&"nowhere.invalid:5432".parse().unwrap()).await;
    assert_eq!((unknown.outcome, unknown.resolved), (Outcome::NameUnknown, None));
    assert_eq!(unknown.protocol.as_str(), "tcp");
    let named = probe(&format!("localhost:{}", closed.port()).parse().unwrap()).await;
    assert_eq!(named.outcome, Outcome::Refused);
    assert!(named.resolved.is_some_and(|resolved| resolved.addresses >= 1));
}

#[test]
fn a_knock_on_a_closed_door_fails() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        assert!(knock(&closed.to_string().parse().unwrap(), Arc::default()).await.is_err());
        let open = greeting(b"").await;
        assert!(knock(&open, Arc::default()).await.is_ok());
    });
}

/// A certificate for these names that signed itself, and TLS with it.
fn acceptor(names: &[&str]) -> tokio_rustls::TlsAcceptor {
    let names: Vec<_> = names.iter().map(|&name| name.to_owned()).collect();
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::new(names).unwrap();
    params.not_before = rcgen::date_time_ymd(2020, 1, 1);
    params.not_after = rcgen::date_time_ymd(2120, 1, 1);
    let certificate = params.self_signed(&key).unwrap();
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![certificate.der().clone()],
            rustls::pki_types::PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
        )
        .unwrap();
    tokio_rustls::TlsAcceptor::from(std::sync::Arc::new(config))
}

#[tokio::test]
async fn postgres_is_asked_for_tls_and_shows_its_certificate() {
    let acceptor = acceptor(&["db.internal", "10.1.2.3"]);
    let target = served(move |mut tcp| {
        let acceptor = acceptor.clone();
        async move {
            let mut request = [0; 8];
            if tcp.read_exact(&mut request).await.is_err() || request != *SSL_REQUEST {
                return;
            }
            let _ = tcp.write_all(b"S").await;
            let Ok(mut tls) = acceptor.accept(tcp).await else { return };
            let _ = tls.read(&mut [0; 1024]).await;
            let _ = tls.write_all(b"R\0\0\0\x17\0\0\0\x0aSCRAM-SHA-256\0\0").await;
            let _ = tls.read(&mut [0; 1024]).await;
        }
    })
    .await;
    let report = probe(&target).await;
    says(&report, "postgres", Some("asks for a password"), None);
    let tls = report.tls.unwrap();
    let names: Vec<_> = tls.names.iter().map(Printable::as_str).collect();
    assert_eq!((tls.version.as_str(), names), ("TLS 1.3", vec!["db.internal", "10.1.2.3"]));
    assert_eq!(tls.not_before, Some(1_577_836_800));
    assert_eq!(tls.not_after, Some(4_733_510_400));
    assert_eq!(tls.name_matches, Some(false), "it was dialled as 127.0.0.1");
    assert_ne!(tls.trusted, Some(true));
}

#[tokio::test]
async fn tls_is_seen_whatever_is_inside_and_whatever_comes_of_it() {
    let acceptor = acceptor(&["127.0.0.1"]);
    let silent = served(move |tcp| {
        let acceptor = acceptor.clone();
        async move {
            let Ok(mut tls) = acceptor.accept(tcp).await else { return };
            let _ = tls.read_to_end(&mut Vec::new()).await;
        }
    })
    .await;
    let report = probe(&silent).await;
    says(&report, "tls", None, None);
    assert_eq!(report.tls.unwrap().name_matches, Some(true));

    // Alert: handshake failure, to everything.
    let refusing: &[(&[u8], &[u8])] = &[(b"", b"\x15\x03\x03\0\x02\x02\x28")];
    says(&probe(&answering(refusing).await).await, "tls", None, Some("refuses the TLS handshake"));
    // 'S', and then no TLS.
    let odd: &[(&[u8], &[u8])] = &[(SSL_REQUEST, b"S"), (b"\x16\x03", b"nothing of the kind\r\n")];
    let report = probe(&answering(odd).await).await;
    says(&report, "postgres", None, Some("ends the TLS handshake"));
}
