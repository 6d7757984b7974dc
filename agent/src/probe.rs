//! Finds out how a target is: whether its name resolves, whether it accepts connections, and what it
//! speaks.
//!
//! A server that accepts connections is never called ill: what is not recognised is `tcp`, with a warning
//! where it is odd. Everything is bounded: each wait, the bytes that are read, the connections that are
//! made. What is asked is chosen so that it leaves few traces in the logs of the servers:
//!
//! - who greets first is only listened to, and left with its protocol's word for the end;
//! - MySQL counts connections that end inside its handshake, and locks out the machine that they come from
//!   after a hundred (`max_connect_errors`); a login that is refused does not count, so one is tried;
//! - PostgreSQL is asked for TLS, and then begins a login that goes no further than its first question:
//!   it logs neither.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use connect_spec::{
    check::{CheckReport, Outcome, Printable, Protocol, Resolved, TlsReport},
    limits::MAX_CHECK_TEXT_BYTES,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpStream, lookup_host},
    time::{timeout, timeout_at},
};

use crate::{target::Target, target_tls};

/// A name resolves within this time.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(5);
/// All addresses of a target together are tried for this long.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A server that greets does it within this time, as a rule.
const GREETING_WAIT: Duration = Duration::from_millis(300);
/// One that greets by the meaning of its port may first look up who comes.
const LATE_GREETING_WAIT: Duration = Duration::from_secs(4);
/// The protocol of the port is waited for longer than one that is only guessed.
const ANSWER_WAIT: Duration = Duration::from_secs(3);
const GUESS_WAIT: Duration = Duration::from_millis(700);
/// All that is asked after the connection.
const ASK_TIMEOUT: Duration = Duration::from_secs(8);
/// A word for the end may take this long.
const PART_WAIT: Duration = Duration::from_millis(500);
/// Bytes that are read of one answer.
const MAX_ANSWER: usize = 8 * 1024;
/// Who the probe says it is where a protocol wants a name: visible in logs, and no user anywhere.
const USER: &str = "connect_check";

/// What is spoken at a target, as far as it was found out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Finding {
    /// A name, or `None` for what was not recognised.
    protocol: Option<&'static str>,
    detail: Option<String>,
    warning: Option<String>,
    tls: Option<TlsReport>,
}

impl Finding {
    fn of(protocol: &'static str) -> Self {
        Self { protocol: Some(protocol), ..Self::default() }
    }

    fn detail(self, detail: impl Into<String>) -> Self {
        Self { detail: Some(detail.into()), ..self }
    }

    fn warning(self, warning: impl Into<String>) -> Self {
        Self { warning: Some(warning.into()), ..self }
    }
}

/// Looks at a target: within about 20 seconds, most of them only when it is silent.
pub(crate) async fn probe(target: &Target) -> CheckReport {
    let failed = |outcome, resolved| CheckReport {
        outcome,
        resolved,
        connected_micros: None,
        protocol: protocol("tcp"),
        detail: None,
        warning: None,
        tls: None,
    };
    let begun = Instant::now();
    let addresses =
        match timeout(RESOLVE_TIMEOUT, lookup_host((target.host(), target.port()))).await {
            Ok(Ok(addresses)) => addresses.collect::<Vec<_>>(),
            Ok(Err(_)) | Err(_) => Vec::new(),
        };
    // An address is not resolved.
    let is_name = target.host().parse::<IpAddr>().is_err();
    let resolved = (is_name && !addresses.is_empty()).then(|| Resolved {
        addresses: u32::try_from(addresses.len()).unwrap_or(u32::MAX),
        micros: micros(begun.elapsed()),
    });
    if addresses.is_empty() {
        return failed(Outcome::NameUnknown, None);
    }
    let begun = Instant::now();
    let connected = timeout(CONNECT_TIMEOUT, TcpStream::connect(addresses.as_slice())).await;
    let tcp = match connected {
        Ok(Ok(tcp)) => tcp,
        Ok(Err(error)) => return failed(outcome_of(&error), resolved),
        Err(_) => return failed(Outcome::TimedOut, resolved),
    };
    let connected_micros = Some(micros(begun.elapsed()));
    let finding = match tcp.peer_addr() {
        Ok(address) => timeout(ASK_TIMEOUT, Asking { target, address }.ask(tcp)).await,
        // It hung up already.
        Err(_) => Ok(hung_up()),
    };
    let finding = finding.unwrap_or_else(|_| silent());
    CheckReport {
        outcome: Outcome::Connected,
        resolved,
        connected_micros,
        protocol: protocol(finding.protocol.unwrap_or("tcp")),
        detail: finding.detail.as_deref().and_then(Printable::of),
        warning: finding.warning.as_deref().and_then(Printable::of),
        tls: finding.tls,
    }
}

/// Whether a target accepts a connection. Where it is a server that takes offence at connections that
/// only end, it is told properly, on a task that ends by itself in a moment and takes note of who `greets`.
///
/// # Errors
/// Why there is no connection; the caller bounds the time.
pub(crate) async fn knock(target: &Target, greets: Arc<AtomicBool>) -> io::Result<()> {
    let mut tcp = target.connect().await?;
    tokio::spawn(async move {
        let part = async {
            let Heard { bytes, ended, .. } = listen(&mut tcp, GREETING_WAIT).await;
            greets.store(!bytes.is_empty(), Ordering::Relaxed);
            if ended == Ended::Waiting && recognise(&bytes) == Some("mysql") {
                mysql(tcp, &bytes).await;
            }
        };
        // What a server does not hear in this time it does not want to hear.
        let _ = timeout(ANSWER_WAIT, part).await;
    });
    Ok(())
}

fn outcome_of(error: &io::Error) -> Outcome {
    if error.kind() == io::ErrorKind::ConnectionRefused {
        Outcome::Refused
    } else if error.kind() == io::ErrorKind::TimedOut {
        Outcome::TimedOut
    } else {
        Outcome::Unreachable
    }
}

fn protocol(name: &'static str) -> Protocol {
    Protocol::new(name).expect("the names here are lower-case words")
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

fn hung_up() -> Finding {
    Finding::default().warning("it accepts connections and closes them at once")
}

fn silent() -> Finding {
    Finding::default().warning("it accepts connections and says nothing")
}

/// What came back within a time.
struct Heard {
    bytes: Vec<u8>,
    ended: Ended,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ended {
    /// There may be more.
    Waiting,
    /// The other side closed.
    Closed,
}

/// Reads until `enough` says so, the time is over, the other side closes, or it is too much.
async fn hear(
    io: &mut (impl AsyncRead + Unpin),
    wait: Duration,
    enough: impl Fn(&[u8]) -> bool,
) -> Heard {
    let deadline = tokio::time::Instant::now() + wait;
    let mut heard = Heard { bytes: Vec::new(), ended: Ended::Waiting };
    let mut part = [0; 1024];
    while heard.bytes.len() < MAX_ANSWER && (heard.bytes.is_empty() || !enough(&heard.bytes)) {
        match timeout_at(deadline, io.read(&mut part)).await {
            Ok(Ok(0) | Err(_)) => {
                heard.ended = Ended::Closed;
                break;
            }
            Ok(Ok(length)) => heard.bytes.extend_from_slice(&part[..length]),
            Err(_) => break,
        }
    }
    heard
}

/// Waits for a greeting.
async fn listen(io: &mut (impl AsyncRead + Unpin), wait: Duration) -> Heard {
    hear(io, wait, |bytes| bytes.contains(&b'\n') || recognise(bytes).is_some()).await
}

/// Says something and waits for the answer.
async fn ask(
    io: &mut (impl AsyncRead + AsyncWrite + Unpin),
    question: &[u8],
    wait: Duration,
    enough: impl Fn(&[u8]) -> bool,
) -> Heard {
    let said = async {
        io.write_all(question).await?;
        io.flush().await
    };
    match timeout(wait, said).await {
        Ok(Ok(())) => hear(io, wait, enough).await,
        Ok(Err(_)) => Heard { bytes: Vec::new(), ended: Ended::Closed },
        Err(_) => Heard { bytes: Vec::new(), ended: Ended::Waiting },
    }
}

/// Says a last word and hangs up.
async fn part(io: &mut (impl AsyncWrite + Unpin), word: &[u8]) {
    let said = async {
        io.write_all(word).await?;
        io.shutdown().await
    };
    // It is a courtesy.
    let _ = timeout(PART_WAIT, said).await;
}

/// What is recognised by how it answers whatever it was asked, or nothing.
fn recognise(bytes: &[u8]) -> Option<&'static str> {
    if is_mysql(bytes) {
        return Some("mysql");
    }
    if is_amqp_start(bytes) {
        return Some("amqp");
    }
    if bytes.starts_with(b"220") && bytes.contains(&b'\n') {
        let text = String::from_utf8_lossy(bytes).to_ascii_uppercase();
        if text.contains("SMTP") {
            return Some("smtp");
        }
        return text.contains("FTP").then_some("ftp");
    }
    let starts = |start: &[u8]| bytes.starts_with(start);
    [
        (starts(b"SSH-2.0-") || starts(b"SSH-1.99-"), "ssh"),
        (starts(b"HTTP/1."), "http"),
        (starts(b"+PONG") || is_redis_error(bytes), "redis"),
        (starts(b"+OK "), "pop3"),
        (starts(b"* OK") || starts(b"* PREAUTH"), "imap"),
        (starts(b"RFB 00"), "vnc"),
        (starts(b"AMQP\0") || starts(b"AMQP\x03"), "amqp"),
        (starts(b"\x15\x03") || starts(b"\x16\x03"), "tls"),
        (postgres_answer(bytes).is_some(), "postgres"),
    ]
    .into_iter()
    .find_map(|(is_it, name)| is_it.then_some(name))
}

/// `-CODE …`, as Redis and its kin answer what they do not grant. POP3 says `-ERR` too, but greets first.
fn is_redis_error(bytes: &[u8]) -> bool {
    [
        &b"-ERR "[..],
        b"-NOAUTH ",
        b"-NOPERM ",
        b"-DENIED ",
        b"-LOADING ",
        b"-MASTERDOWN ",
        b"-MISCONF ",
        b"-BUSY ",
    ]
    .iter()
    .any(|code| bytes.starts_with(code))
}

/// The greeting of MySQL and MariaDB, or the error that some get in its place.
fn is_mysql(bytes: &[u8]) -> bool {
    let [a, b, c, 0, kind, rest @ ..] = bytes else {
        return false;
    };
    let length = usize::from(*a) | usize::from(*b) << 8 | usize::from(*c) << 16;
    match kind {
        // The version is text and ends with a zero.
        10 => {
            length > 20
                && rest.iter().position(|byte| *byte == 0).is_some_and(|end| {
                    (1..80).contains(&end) && rest[..end].iter().all(|byte| byte.is_ascii_graphic())
                })
        }
        0xff => (4..512).contains(&length) && rest.len() >= 2,
        _ => false,
    }
}

/// Connection.Start, the first frame of a broker of AMQP 0-9-1.
fn is_amqp_start(bytes: &[u8]) -> bool {
    matches!(bytes, [1, 0, 0, _, _, _, _, 0, 10, 0, 10, ..])
}

/// Whether a server greets by the meaning of its port.
fn greets(port: u16) -> bool {
    [21, 22, 25, 110, 143, 587, 3306, 5900].contains(&port)
}

/// One target that accepted a connection.
struct Asking<'t> {
    target: &'t Target,
    address: SocketAddr,
}

/// What one guess brought.
enum Guess {
    Right(Finding),
    /// It answered as another protocol does.
    Rather(&'static str),
    /// It said something that nobody knows.
    Babble,
    Nothing(Ended),
}

impl Guess {
    /// What an answer means that is not the one that was hoped for.
    fn other_than(heard: &Heard) -> Self {
        match recognise(&heard.bytes) {
            Some(protocol) => Self::Rather(protocol),
            None if heard.bytes.is_empty() => Self::Nothing(heard.ended),
            None => Self::Babble,
        }
    }
}

impl Asking<'_> {
    async fn ask(&self, mut tcp: TcpStream) -> Finding {
        let wait = if greets(self.target.port()) { LATE_GREETING_WAIT } else { GREETING_WAIT };
        let greeting = listen(&mut tcp, wait).await;
        if !greeting.bytes.is_empty() {
            return greeted(tcp, &greeting.bytes).await;
        }
        if greeting.ended == Ended::Closed {
            return hung_up();
        }
        if greets(self.target.port()) {
            return silent();
        }
        self.guess(tcp).await
    }

    /// Asks in one protocol after the other. The first question goes over the connection that is there.
    async fn guess(&self, tcp: TcpStream) -> Finding {
        let by_port = match self.target.protocol() {
            "https" => "tls",
            "elasticsearch" => "http",
            other => other,
        };
        // Redis takes HTTP for an attack and logs it, so it is asked before.
        let all = ["postgres", "redis", "http", "tls", "mongodb", "amqp"];
        let mut guesses: Vec<_> = all.iter().copied().filter(|guess| *guess == by_port).collect();
        let known_by_port = !guesses.is_empty();
        guesses.extend(all.iter().copied().filter(|guess| *guess != by_port));
        guesses.reverse();
        let mut wait = if known_by_port { ANSWER_WAIT } else { GUESS_WAIT };
        let mut connection = Some(tcp);
        let (mut babbled, mut closed) = (false, false);
        while let Some(guess) = guesses.pop() {
            let tcp = match connection.take() {
                Some(tcp) => tcp,
                None => match TcpStream::connect(self.address).await {
                    Ok(tcp) => tcp,
                    // It had enough, which is no reason to call it ill.
                    Err(_) => break,
                },
            };
            match self.try_one(guess, tcp, wait).await {
                Guess::Right(finding) => return finding,
                Guess::Rather(protocol) => {
                    if let Some(at) = guesses.iter().position(|guess| *guess == protocol) {
                        guesses.remove(at);
                        guesses.push(protocol);
                        wait = ANSWER_WAIT;
                        continue;
                    }
                    if protocol != guess && !all.contains(&protocol) {
                        return Finding::of(protocol);
                    }
                    babbled = true;
                }
                Guess::Babble => babbled = true,
                Guess::Nothing(Ended::Closed) => closed = true,
                Guess::Nothing(Ended::Waiting) => {}
            }
            wait = GUESS_WAIT;
        }
        if babbled || closed {
            return Finding::default().detail("answers, in a protocol that is not known here");
        }
        silent()
    }

    async fn try_one(&self, guess: &str, tcp: TcpStream, wait: Duration) -> Guess {
        match guess {
            "postgres" => self.postgres(tcp, wait).await,
            "redis" => redis(tcp, wait).await,
            "http" => self.http(tcp, wait).await,
            "tls" => self.tls(tcp, wait).await,
            "mongodb" => mongodb(tcp, wait).await,
            _ => amqp(tcp, wait).await,
        }
    }

    async fn postgres(&self, mut tcp: TcpStream, wait: Duration) -> Guess {
        const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f];
        let heard = ask(&mut tcp, &SSL_REQUEST, wait, |_| true).await;
        match heard.bytes.as_slice() {
            b"N" => postgres_login(tcp, wait).await,
            b"S" => {
                let tls =
                    match timeout(wait, target_tls::connect(self.target.host(), self.address, tcp))
                        .await
                    {
                        Ok(tls) => tls,
                        Err(_) => return Guess::Nothing(Ended::Waiting),
                    };
                match tls.stream {
                    Some(stream) => {
                        let answer = postgres_login(stream, wait).await;
                        if let Guess::Right(finding) = answer {
                            return Guess::Right(Finding { tls: tls.report, ..finding });
                        }
                        answer
                    }
                    None => Guess::Right(Finding {
                        tls: tls.report,
                        ..Finding::of("postgres").warning(tls.why)
                    }),
                }
            }
            bytes => match postgres_answer(bytes) {
                Some(answer) => Guess::Right(answer),
                None => Guess::other_than(&heard),
            },
        }
    }

    async fn http(&self, mut tcp: TcpStream, wait: Duration) -> Guess {
        match http_status(&mut tcp, self.target, wait).await {
            // What servers of HTTPS answer to plain HTTP, among others.
            Ok(400) => {
                let Ok(tcp) = TcpStream::connect(self.address).await else {
                    return Guess::Right(Finding::of("http").detail("HTTP 400"));
                };
                match self.tls(tcp, wait).await {
                    Guess::Right(finding) => Guess::Right(finding),
                    Guess::Rather(_) | Guess::Babble | Guess::Nothing(_) => {
                        Guess::Right(Finding::of("http").detail("HTTP 400"))
                    }
                }
            }
            Ok(status) => Guess::Right(Finding::of("http").detail(format!("HTTP {status}"))),
            Err(heard) => Guess::other_than(&heard),
        }
    }

    /// TLS from the first byte, and what is spoken in it.
    async fn tls(&self, tcp: TcpStream, wait: Duration) -> Guess {
        // A handshake is more work than an answer.
        let wait = wait.max(2 * GUESS_WAIT);
        let connecting = target_tls::connect(self.target.host(), self.address, tcp);
        let Ok(tls) = timeout(wait, connecting).await else {
            return Guess::Nothing(Ended::Waiting);
        };
        let Some(mut stream) = tls.stream else {
            return match tls.report {
                Some(report) => Guess::Right(Finding {
                    tls: Some(report),
                    ..Finding::of("tls").warning(tls.why)
                }),
                None if tls.speaks_tls => Guess::Right(Finding::of("tls").warning(tls.why)),
                None => Guess::Nothing(Ended::Closed),
            };
        };
        let inside = match self.target.port() {
            6379 | 6380 => match redis(stream, wait).await {
                Guess::Right(finding) => finding,
                Guess::Rather(_) | Guess::Babble | Guess::Nothing(_) => Finding::of("tls"),
            },
            _ => match http_status(&mut stream, self.target, wait).await {
                Ok(status) => Finding::of("https").detail(format!("HTTP {status}")),
                Err(_) => Finding::of("tls"),
            },
        };
        Guess::Right(Finding { tls: tls.report, ..inside })
    }
}

/// A server that spoke first.
async fn greeted(mut tcp: TcpStream, greeting: &[u8]) -> Finding {
    let Some(protocol) = recognise(greeting) else {
        part(&mut tcp, b"").await;
        return Finding::default().detail("speaks first, in a protocol that is not known here");
    };
    match protocol {
        "mysql" => mysql(tcp, greeting).await,
        "ssh" => {
            part(&mut tcp, b"").await;
            let line = greeting.split(|byte| *byte == b'\r' || *byte == b'\n').next();
            let version = line.and_then(|line| line.splitn(3, |byte| *byte == b'-').nth(2));
            let version = version.map(token).filter(|version| !version.is_empty());
            Finding { detail: version, ..Finding::of("ssh") }
        }
        "smtp" | "ftp" | "pop3" => {
            part(&mut tcp, b"QUIT\r\n").await;
            Finding::of(protocol)
        }
        "imap" => {
            part(&mut tcp, b"a LOGOUT\r\n").await;
            Finding::of(protocol)
        }
        // These do not greet: what looks like it is something else.
        "http" | "redis" | "tls" | "postgres" => {
            part(&mut tcp, b"").await;
            Finding::default().detail("speaks first, in a protocol that is not known here")
        }
        other => {
            part(&mut tcp, b"").await;
            Finding::of(other)
        }
    }
}

/// The first word of a version: letters, digits and what stands between them.
fn token(bytes: &[u8]) -> String {
    let plain = |byte: &&u8| byte.is_ascii_alphanumeric() || b"._-+".contains(byte);
    bytes
        .iter()
        .take_while(plain)
        .take(MAX_CHECK_TEXT_BYTES / 4)
        .map(|byte| char::from(*byte))
        .collect()
}

/// Parts from a MySQL that greeted by a login that it refuses.
async fn mysql(mut tcp: TcpStream, greeting: &[u8]) -> Finding {
    let finding = Finding::of("mysql");
    if greeting.get(4) == Some(&0xff) {
        return match greeting {
            [_, _, _, _, _, low, high, ..] => match u16::from_le_bytes([*low, *high]) {
                1040 => finding.warning("it has too many connections"),
                1129 => finding.warning(
                    "it has locked out the exposer's machine for its failed connections: `FLUSH HOSTS` there",
                ),
                1130 => finding.warning("it does not allow the exposer's machine in"),
                code => finding.warning(format!("it answers error {code}")),
            },
            _ => finding,
        };
    }
    let version = greeting.get(5..).map(token).unwrap_or_default();
    // MariaDB 10 puts this before its own, for replicas that cannot read two digits.
    let version = version.strip_prefix("5.5.5-").unwrap_or(&version).to_owned();
    // The greeting has to be whole before it is answered.
    let whole = |bytes: &[u8]| {
        let length =
            usize::from(bytes[0]) | usize::from(bytes[1]) << 8 | usize::from(bytes[2]) << 16;
        bytes.len() >= length + 4
    };
    if !whole(greeting) {
        let missing = |more: &[u8]| whole(&[greeting, more].concat());
        hear(&mut tcp, PART_WAIT, missing).await;
    }
    let answered = |bytes: &[u8]| bytes.len() > 4;
    // Protocol 4.1, authentication by plug-in, no password.
    const CAPABILITIES: u32 = 0x0000_0200 | 0x0000_8000 | 0x0008_0000;
    let mut login = Vec::new();
    login.extend(CAPABILITIES.to_le_bytes());
    login.extend((16_u32 << 20).to_le_bytes());
    login.push(33);
    login.extend([0; 23]);
    login.extend(USER.as_bytes());
    login.extend([0, 0]);
    login.extend(b"mysql_native_password\0");
    let mut heard = ask(&mut tcp, &mysql_packet(1, &login), ANSWER_WAIT, answered).await;
    if heard.bytes.get(4) == Some(&0xfe) {
        // Asked for another way of authentication: again without a password.
        let sequence = heard.bytes[3].wrapping_add(1);
        heard = ask(&mut tcp, &mysql_packet(sequence, &[]), ANSWER_WAIT, answered).await;
    }
    let detail = match heard.bytes.get(4) {
        Some(0) => {
            part(&mut tcp, &mysql_packet(0, &[1])).await;
            format!("{version}, asks for no password")
        }
        Some(0xff) => format!("{version}, asks for a password"),
        Some(_) | None => version,
    };
    finding.detail(detail)
}

fn mysql_packet(sequence: u8, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len()).expect("ours are short").to_le_bytes();
    [&length[..3], &[sequence], body].concat()
}

async fn postgres_login(mut io: impl AsyncRead + AsyncWrite + Unpin, wait: Duration) -> Guess {
    let mut startup = 196_608_u32.to_be_bytes().to_vec();
    for text in ["user", USER, "database", "postgres", "application_name", USER, ""] {
        startup.extend(text.as_bytes());
        startup.push(0);
    }
    let length = u32::try_from(startup.len() + 4).expect("ours is short");
    let question = [&length.to_be_bytes()[..], &startup].concat();
    let heard = ask(&mut io, &question, wait, |bytes| postgres_answer(bytes).is_some()).await;
    match postgres_answer(&heard.bytes) {
        Some(finding) => {
            // Terminate; whoever waits for a password hears it too.
            part(&mut io, &[b'X', 0, 0, 0, 4]).await;
            Guess::Right(finding)
        }
        None => Guess::other_than(&heard),
    }
}

/// What PostgreSQL says to a login, if it is PostgreSQL and the message is whole.
fn postgres_answer(bytes: &[u8]) -> Option<Finding> {
    let [kind, a, b, c, d, rest @ ..] = bytes else {
        return None;
    };
    let length = usize::try_from(u32::from_be_bytes([*a, *b, *c, *d])).ok()?.checked_sub(4)?;
    let body = rest.get(..length)?;
    let finding = Finding::of("postgres");
    match kind {
        b'R' => {
            let [a, b, c, d, ..] = body else { return None };
            Some(match u32::from_be_bytes([*a, *b, *c, *d]) {
                0 => finding.detail("asks for no password"),
                3 | 5 | 10 => finding.detail("asks for a password"),
                _ => finding.detail("asks for credentials"),
            })
        }
        b'E' => {
            // Fields `code u8 || text || 0`; C is the SQLSTATE.
            let fields = body.split(|byte| *byte == 0);
            let state = fields
                .filter_map(|field| field.strip_prefix(b"C"))
                .find(|state| state.len() == 5)?;
            Some(match state {
                b"53300" => finding.warning("it has too many connections"),
                b"57P03" => finding.warning("it is starting up or shutting down"),
                // The user is none of its own, or this machine is not in its pg_hba.conf: it is well.
                _ => finding.detail("answers"),
            })
        }
        // It negotiates the version, and goes on.
        b'v' => postgres_answer(rest.get(length..)?).or(Some(finding)),
        _ => None,
    }
}

async fn redis(mut io: impl AsyncRead + AsyncWrite + Unpin, wait: Duration) -> Guess {
    let heard = ask(&mut io, b"PING\r\n", wait, |bytes| bytes.contains(&b'\n')).await;
    let said = |start: &[u8]| heard.bytes.starts_with(start);
    let finding = Finding::of("redis");
    let finding = if said(b"+PONG") {
        finding.detail("answers PING")
    } else if said(b"-NOAUTH") || said(b"-NOPERM") {
        finding.detail("asks for a password")
    } else if said(b"-DENIED") {
        finding.detail("is in protected mode")
    } else if said(b"-LOADING") || said(b"-MASTERDOWN") || said(b"-BUSY") || said(b"-MISCONF") {
        finding.warning("it is not ready for commands")
    } else if is_redis_error(&heard.bytes) {
        finding.detail("answers")
    } else {
        return Guess::other_than(&heard);
    };
    part(&mut io, b"").await;
    Guess::Right(finding)
}

/// The status of an answer to HEAD; what was heard when it was none.
async fn http_status(
    io: &mut (impl AsyncRead + AsyncWrite + Unpin),
    target: &Target,
    wait: Duration,
) -> Result<u16, Heard> {
    let question = format!(
        "HEAD / HTTP/1.1\r\nHost: {target}\r\nUser-Agent: connect-check\r\nAccept: */*\r\nConnection: close\r\n\r\n"
    );
    let heard = ask(io, question.as_bytes(), wait, |bytes| bytes.contains(&b'\n')).await;
    let digits = match heard.bytes.as_slice() {
        [b'H', b'T', b'T', b'P', b'/', b'1', b'.', _, b' ', digits @ ..] => digits.get(..3),
        _ => None,
    };
    let status = digits
        .and_then(|digits| std::str::from_utf8(digits).ok())
        .and_then(|digits| digits.parse().ok())
        .filter(|status| (100..1000).contains(status));
    part(io, b"").await;
    status.ok_or(heard)
}

async fn mongodb(mut tcp: TcpStream, wait: Duration) -> Guess {
    const REQUEST_ID: i32 = 0x0043_4f4e;
    const OP_MSG: i32 = 2013;
    // {hello: 1, $db: "admin"}
    let document = b"\x1f\0\0\0\x10hello\0\x01\0\0\0\x02$db\0\x06\0\0\0admin\0\0";
    let length = i32::try_from(16 + 4 + 1 + document.len()).expect("ours is short");
    let mut question = Vec::new();
    for number in [length, REQUEST_ID, 0, OP_MSG, 0] {
        question.extend(number.to_le_bytes());
    }
    question.push(0);
    question.extend(document);
    let heard = ask(&mut tcp, &question, wait, |bytes| bytes.len() >= 16).await;
    let number = |at: usize| heard.bytes.get(at..at + 4);
    if number(8) == Some(&REQUEST_ID.to_le_bytes()) && number(12) == Some(&OP_MSG.to_le_bytes()) {
        part(&mut tcp, b"").await;
        return Guess::Right(Finding::of("mongodb").detail("answers hello"));
    }
    Guess::other_than(&heard)
}

async fn amqp(mut tcp: TcpStream, wait: Duration) -> Guess {
    const HEADER: [u8; 8] = *b"AMQP\0\0\x09\x01";
    let heard = ask(&mut tcp, &HEADER, wait, |bytes| bytes.len() >= 11).await;
    // A broker of another version answers with its own header; an echo is no broker.
    let header = heard.bytes.starts_with(b"AMQP") && !heard.bytes.starts_with(&HEADER);
    part(&mut tcp, b"").await;
    if header || is_amqp_start(&heard.bytes) {
        return Guess::Right(Finding::of("amqp"));
    }
    if heard.bytes.starts_with(&HEADER) {
        return Guess::Babble;
    }
    Guess::other_than(&heard)
}

#[cfg(test)]
mod tests;
