//! A hub with a certificate that an authority signed: what agents accept, what they say when they do not,
//! and how the certificate is replaced while everything runs.

use std::{
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    sync::Arc,
};

use connect_tests::{
    PATIENCE,
    authority::{Authority, CertificateFiles, Flaw},
    home::Home,
    hub::Hub,
    random,
    services::Service,
};
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, StreamOwned, SupportedProtocolVersion,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
    version::{TLS12, TLS13},
};

/// A hub on loopback with a certificate for 127.0.0.1.
fn start(authority: &Authority) -> (Hub, CertificateFiles) {
    let files = CertificateFiles::new();
    authority.issue(&files, "127.0.0.1", Flaw::None);
    let hub = Hub::start(&files.options());
    assert!(hub.url().starts_with("https://") && !hub.url().contains('#'), "{}", hub.url());
    (hub, files)
}

#[test]
fn each_flaw_of_a_certificate_is_named() {
    let authority = Authority::new();
    let (hub, files) = start(&authority);
    let check = |name: &str, flaw: Flaw, ca: Option<&str>, expected: i32, parts: &[&str]| {
        authority.issue(&files, name, flaw);
        hub.reload("the certificate was read again");
        let home = Home::new();
        let mut args = vec!["init", "--hub", hub.url()];
        args.extend(ca.iter().flat_map(|ca| ["--ca", ca]));
        for part in parts {
            home.fails(&args, expected, part);
        }
        assert!(!home.dir().join("membership.json").exists());
        assert!(!home.dir().join("hub-ca.pem").exists());
    };
    let ca = Some(authority.ca());
    check("other.example", Flaw::None, ca, 4, &["for `other.example`, not for `127.0.0.1`"]);
    check("127.0.0.1", Flaw::Expired, ca, 4, &["expired on 2020-01-01T00:00:00Z", "clock"]);
    check("127.0.0.1", Flaw::NotYetValid, ca, 4, &["not valid before 2200-01-01T00:00:00Z"]);
    let unknown = ["no authority that this machine trusts", "--ca FILE", "#sha256="];
    check("127.0.0.1", Flaw::None, None, 4, &unknown);
    let other = Authority::new();
    check("127.0.0.1", Flaw::None, Some(other.ca()), 4, &["no authority of `--ca`", "#sha256="]);
    check("127.0.0.1", Flaw::SelfSigned, None, 4, &["signed itself", "#sha256="]);

    let home = Home::new();
    let pinned = format!("{}#sha256={}", hub.url(), "0".repeat(64));
    home.fails(&["init", "--hub", &pinned], 7, "pinned");
    home.fails(&["init", "--hub", &pinned, "--ca", authority.ca()], 2, "`--ca`");
    let missing = format!("{}.missing", authority.ca());
    home.fails(&["init", "--hub", hub.url(), "--ca", &missing], 2, ".missing`: No such file");
    let key = files.key_path.to_str().expect("a plain name");
    home.fails(&["init", "--hub", hub.url(), "--ca", key], 2, "no certificate in PEM");
    let plain = hub.url().replace("https", "http");
    home.fails(&["init", "--hub", &plain, "--ca", authority.ca()], 2, "leave out `--ca`");
    home.fails(&["init", "--hub", &plain], 4, "cannot reach the hub");
    home.fails(&["init", "--hub", "http://192.0.2.1:7420"], 2, "plain text");
    assert!(!home.dir().join("membership.json").exists());
}

#[test]
fn certificate_is_replaced_under_live_tunnels() {
    let authority = Authority::new();
    let (mut hub, files) = start(&authority);
    let exposer = Home::new();
    exposer.ok(&["init", "--hub", hub.url(), "--ca", authority.ca()]);
    let code = exposer.ok(&["invite"]);
    let reacher = Home::new();
    // The code brings the workspace, and no authority.
    reacher.fails(&["join", &code], 4, "--ca FILE");
    reacher.ok(&["join", &code, "--ca", authority.ca()]);
    let (_exposer_agent, reacher_agent) = (exposer.up(), reacher.up());
    let service = Service::echo();
    exposer.ok(&["expose", &service.address().to_string(), "--name", "echo"]);
    let mut client = TcpStream::connect(reacher.reach("echo")).expect("the local port is bound");
    client.set_read_timeout(Some(PATIENCE)).expect("our own socket");
    check_echo(&mut client);

    let mut seen = vec![shown_certificate(hub.address(), &authority)];
    for _ in 0..5 {
        authority.issue(&files, "127.0.0.1", Flaw::None);
        hub.reload("the certificate was read again");
        check_echo(&mut client);
        let shown = shown_certificate(hub.address(), &authority);
        assert!(!seen.contains(&shown), "an old certificate is shown");
        seen.push(shown);
    }
    assert!(!reacher_agent.stderr().contains("the connection to the hub was lost"));

    // What does not load is named and not used.
    fs::write(&files.key_path, "no key").expect("our own file");
    hub.reload(&format!(
        "the certificate stays as it was: `{}` holds no private key",
        files.key_path.display()
    ));
    let other = CertificateFiles::new();
    authority.issue(&other, "127.0.0.1", Flaw::None);
    fs::copy(&other.key_path, &files.key_path).expect("our own file");
    hub.reload("certificate and key do not go together");
    check_echo(&mut client);
    assert_eq!(seen.last(), Some(&shown_certificate(hub.address(), &authority)));

    // Agents that come back verify the new one.
    authority.issue(&files, "127.0.0.1", Flaw::None);
    hub.kill();
    hub.restart();
    check_echo(&mut client);
    exposer.ok(&["services"]);
    Authority::new().issue(&files, "127.0.0.1", Flaw::None);
    hub.reload("the certificate was read again");
    exposer.fails(&["services"], 4, "no authority of `--ca`");
    // Plain text is refused whenever the hub is dialled.
    let membership = exposer.dir().join("membership.json");
    let text = fs::read_to_string(&membership).expect("it is enrolled");
    let moved = text.replace(hub.url(), "http://192.0.2.1:7420");
    assert_ne!(moved, text);
    fs::write(&membership, moved).expect("our own home");
    exposer.fails(&["services"], 2, "plain text");
}

#[track_caller]
fn check_echo(client: &mut TcpStream) {
    let sent = random(10_000);
    client.write_all(&sent).expect("the tunnel lives");
    let mut received = vec![0; sent.len()];
    client.read_exact(&mut received).expect("the tunnel lives");
    assert_eq!(received, sent);
}

#[test]
fn old_versions_of_tls_are_refused_and_the_good_ones_are_strict() {
    let authority = Authority::new();
    let (hub, _files) = start(&authority);
    for version in [&TLS13, &TLS12] {
        let mut stream = connect(hub.address(), &authority, version);
        stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").expect("TLS");
        let mut answer = String::new();
        // Whoever closes need not say so within TLS.
        let _ = stream.read_to_string(&mut answer);
        assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
        assert!(answer.contains("strict-transport-security: max-age=31536000\r\n"), "{answer}");
    }
    for (minor, expected) in [(1, PROTOCOL_VERSION), (2, PROTOCOL_VERSION), (3, SERVER_HELLO)] {
        let mut stream = TcpStream::connect(hub.address()).expect("the hub listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("our own socket");
        stream.write_all(&client_hello(minor)).expect("it is short");
        let mut head = [0; 7];
        stream.read_exact(&mut head).expect("an answer");
        // The type of the record, and what its content begins with.
        assert_eq!((head[0], head[5]), (expected.0, expected.1), "TLS 1.{}", minor - 1);
        assert!(minor == 3 || head[6] == expected.2, "{head:?}");
    }
}

/// A fatal alert, `protocol_version` (RFC 5246 section 7.2).
const PROTOCOL_VERSION: (u8, u8, u8) = (21, 2, 70);
/// A handshake that goes on.
const SERVER_HELLO: (u8, u8, u8) = (22, 2, 0);

/// A ClientHello of TLS 1.0 (`minor` 1), 1.1 (2) or 1.2 (3), the same but for the version (RFC 5246).
fn client_hello(minor: u8) -> Vec<u8> {
    let mut body = vec![3, minor];
    body.extend(random(32));
    // No session; ECDHE with AES-GCM and AES-CBC; no compression.
    body.extend([0, 0, 4, 0xc0, 0x2b, 0xc0, 0x09, 1, 0]);
    // X25519, uncompressed points, ECDSA with P-256 and SHA-256.
    body.extend([0, 22, 0, 10, 0, 4, 0, 2, 0, 0x1d, 0, 11, 0, 2, 1, 0, 0, 13, 0, 4, 0, 2, 4, 3]);
    let length = u8::try_from(body.len()).expect("it is short");
    let mut hello = vec![22, 3, 1, 0, length + 4, 1, 0, 0, length];
    hello.extend(body);
    hello
}

fn connect(
    address: SocketAddr,
    authority: &Authority,
    version: &'static SupportedProtocolVersion,
) -> StreamOwned<ClientConnection, TcpStream> {
    let mut roots = RootCertStore::empty();
    let ca = CertificateDer::from_pem_file(authority.ca()).expect("our own file");
    roots.add(ca).expect("a certificate");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[version])
        .expect("it is supported")
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::from(address.ip());
    let connection = ClientConnection::new(Arc::new(config), name).expect("a name");
    let stream = TcpStream::connect(address).expect("the hub listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("our own socket");
    StreamOwned::new(connection, stream)
}

/// The certificate that a new connection is shown.
fn shown_certificate(address: SocketAddr, authority: &Authority) -> CertificateDer<'static> {
    let mut stream = connect(address, authority, &TLS13);
    stream.conn.complete_io(&mut stream.sock).expect("a handshake");
    let shown = stream.conn.peer_certificates().and_then(|chain| chain.first());
    shown.expect("a server shows one").clone().into_owned()
}
