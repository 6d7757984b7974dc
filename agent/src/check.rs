//! Checking a service from afar: the exposer looks at its target and says what it found on a stream of the
//! channel, the reacher asks and measures the way between. The hub carries it as it carries the rest.

use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use connect_spec::{
    check::{CheckReport, Outcome, TlsReport},
    ids::ServiceName,
    limits::{MAX_CHECK_REPORT_BYTES, MAX_SOURCE_BYTES},
    objects::UnixTime,
    record::{Purpose, ResetCode},
};
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use crate::{
    agent::Agent,
    clock,
    error::{Error, ErrorKind, Result},
    finding::Finding,
    io::tunnel::{CLOSE_TIMEOUT, ChannelHandle, Stream},
    probe::probe,
    reacher::Reached,
    target::Target,
};

/// The exposer spends no longer on one stream. A probe takes up to 20 s, a transfer what the path needs.
const SERVE_TIMEOUT: Duration = Duration::from_secs(45);
/// The reacher waits so long for a report.
const REPORT_TIMEOUT: Duration = Duration::from_secs(30);
/// Encrypted round trips whose median is the latency.
const PINGS: usize = 9;
/// All of them are answered within this time.
const PINGS_TIMEOUT: Duration = Duration::from_secs(10);
/// The bytes of one direction go on for so long, unless [`MAX_SOURCE_BYTES`] are through before.
const SPEED_TIME: Duration = Duration::from_millis(1500);
/// What a slow path still holds then arrives within this time.
const SPEED_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes that are written at once, and those by which the first guess of a speed is made.
const PART: usize = 64 * 1024;
const FIRST_BYTES: u64 = 1024 * 1024;
/// A certificate that ends sooner is a warning.
const EXPIRES_SOON: Duration = Duration::from_secs(14 * DAY);
const DAY: u64 = 24 * 3600;

/// How a service is, as seen from this agent.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Checked {
    /// Its name.
    pub name: ServiceName,
    /// Whether its target accepts connections.
    pub ok: bool,
    /// `postgres`, `http`, …; `tcp` when that is not known.
    pub protocol: String,
    /// What was found, in the order in which it is shown.
    pub findings: Vec<Finding>,
    /// Median of the encrypted round trips, in milliseconds; `None` when they were not answered.
    pub latency_ms: Option<f64>,
    /// Bytes in a second to the exposer and from it, if that was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub speed: Option<Speed>,
    /// When the certificate of the target ends to be valid, if it showed one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate_until: Option<UnixTime>,
}

/// How fast bytes travel between the agents.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Speed {
    /// To the exposer, in bytes a second.
    pub up: f64,
    /// From the exposer, in bytes a second.
    pub down: f64,
}

// The exposer's side.

/// Serves a stream that is not for the target.
pub(crate) async fn serve(stream: Stream, purpose: Purpose, target: &Target) {
    let serving = async {
        match purpose {
            Purpose::Check => serve_report(&stream, target).await,
            Purpose::Sink => serve_sink(&stream).await,
            Purpose::Source => serve_source(&stream).await,
            // Those never come here: the one is dialled for, the others the channel refuses.
            Purpose::Target | Purpose::Other(_) => {
                stream.reset(ResetCode::UnknownPurpose);
                Ok(())
            }
        }
    };
    match timeout(SERVE_TIMEOUT, serving).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, ?purpose, "a check ended early"),
        Err(_) => stream.reset(ResetCode::TargetTimeout),
    }
}

async fn serve_report(stream: &Stream, target: &Target) -> std::io::Result<()> {
    // A stream that is reset meanwhile wants no answer.
    let report = tokio::select! {
        report = probe(target) => report,
        Err(error) = drain(stream, 0) => return Err(error),
    };
    stream.write_all(report.encode().into()).await?;
    stream.finish()?;
    drain(stream, 0).await.map(|_| ())
}

async fn serve_sink(stream: &Stream) -> std::io::Result<()> {
    let count = drain(stream, MAX_SOURCE_BYTES).await?;
    stream.write_all(Bytes::copy_from_slice(&count.to_be_bytes())).await?;
    stream.finish()
}

async fn serve_source(stream: &Stream) -> std::io::Result<()> {
    let wanted = read_to_end(stream, 8).await?;
    let wanted = <[u8; 8]>::try_from(wanted.as_ref()).ok().map(u64::from_be_bytes);
    let Some(wanted) = wanted.filter(|wanted| *wanted <= MAX_SOURCE_BYTES) else {
        stream.reset(ResetCode::Busy);
        return Ok(());
    };
    write_zeros(stream, wanted, |_| true).await?;
    stream.finish()
}

/// Drops what is read, to the end; an error when it is more than `most`.
async fn drain(stream: &Stream, most: u64) -> std::io::Result<u64> {
    let mut count = 0;
    loop {
        let part = stream.read(PART).await?;
        if part.is_empty() {
            return Ok(count);
        }
        count += part.len() as u64;
        if count > most {
            stream.reset(ResetCode::Busy);
            return Err(std::io::ErrorKind::FileTooLarge.into());
        }
    }
}

/// Reads to the end; an error when it is more than `most` bytes.
async fn read_to_end(stream: &Stream, most: usize) -> std::io::Result<Bytes> {
    let mut all = BytesMut::new();
    loop {
        let part = stream.read(PART).await?;
        if part.is_empty() {
            return Ok(all.freeze());
        }
        all.extend_from_slice(&part);
        if all.len() > most {
            stream.reset(ResetCode::Busy);
            return Err(std::io::ErrorKind::FileTooLarge.into());
        }
    }
}

/// Writes up to `most` bytes while `goes_on` says so.
async fn write_zeros(
    stream: &Stream,
    most: u64,
    goes_on: impl Fn(u64) -> bool,
) -> std::io::Result<()> {
    let part = Bytes::from(vec![0; PART]);
    let mut written = 0;
    while written < most && goes_on(written) {
        let length = (most - written).min(PART as u64);
        stream.write_all(part.slice(..usize::try_from(length).unwrap_or(PART))).await?;
        written += length;
    }
    Ok(())
}

// The reacher's side.

impl Agent {
    /// Looks at a service through its exposer, and measures the way to it. Binds no port; a service that is
    /// not reached already is let go of afterwards.
    ///
    /// # Errors
    /// [`ErrorKind::ServiceNotFound`], [`ErrorKind::ExposerOffline`], [`ErrorKind::Refused`],
    /// [`ErrorKind::TrustViolation`], or why there is no hub. A target that does not answer is no error
    /// here: [`Checked::ok`] says so.
    pub async fn check(&self, name: &ServiceName, speed: bool) -> Result<Checked> {
        // Says at once what a tunnel would have to be waited for.
        self.find(name).await?;
        if let Some(reached) = self.reached(name) {
            return check(&reached, name, speed).await;
        }
        let reached = Reached::start(self.shared_core(), name.clone());
        let checked = check(&reached, name, speed).await;
        if let Some(channel) = reached.stop() {
            // An exposer that does not take the last word cannot hold us.
            let _ = timeout(CLOSE_TIMEOUT, channel.closed()).await;
        }
        checked
    }
}

async fn check(reached: &Reached, name: &ServiceName, speed: bool) -> Result<Checked> {
    reached.ready().await?;
    let (stream, channel) = reached.open_for(Purpose::Check).await?;
    let asked = async {
        stream.finish()?;
        read_to_end(&stream, MAX_CHECK_REPORT_BYTES).await
    };
    let answer = timeout(REPORT_TIMEOUT, asked)
        .await
        .map_err(|_| ended("it sends no report"))?
        .map_err(|error| match error.get_ref().and_then(|inner| inner.downcast_ref()) {
            Some(crate::engine::channel::StreamError::Reset(ResetCode::Busy)) => {
                Error::new(ErrorKind::Refused, "the exposer has too many checks under way")
                    .hint("try again in a moment")
            }
            _ => ended(&error),
        })?;
    let report = CheckReport::decode(&answer).map_err(|error| {
        Error::new(ErrorKind::Other, format_args!("the exposer's report cannot be read: {error}"))
            .hint("is one of the two agents out of date?")
    })?;
    drop(stream);
    let mut findings = about_target(&report, name);
    let latency = latency(&channel).await;
    findings.push(match latency {
        Some(latency) => Finding::ok(
            "latency",
            "Latency",
            format_args!("{} (median of {PINGS}, encrypted, through the hub)", millis(latency)),
        ),
        None => Finding::warn("latency", "Latency", "encrypted pings were not answered in time"),
    });
    let speed = if speed { Some(measure(reached).await) } else { None };
    let speed = match speed {
        Some(Ok(speed)) => {
            let text = format!("↑ {}  ↓ {}", per_second(speed.up), per_second(speed.down));
            findings.push(Finding::ok("speed", "Speed", text));
            Some(speed)
        }
        Some(Err(error)) => {
            findings.push(Finding::warn("speed", "Speed", format_args!("not measured: {error}")));
            None
        }
        None => None,
    };
    Ok(Checked {
        name: name.clone(),
        ok: report.outcome == Outcome::Connected,
        protocol: report.protocol.as_str().to_owned(),
        findings,
        latency_ms: latency.map(|latency| latency.as_secs_f64() * 1000.0),
        speed,
        certificate_until: report.tls.and_then(|tls| tls.not_after),
    })
}

fn ended(cause: &(impl std::fmt::Display + ?Sized)) -> Error {
    Error::new(ErrorKind::ExposerOffline, format_args!("the check was not answered: {cause}"))
        .hint("is the exposer's agent of the same version?")
}

/// The median of some encrypted round trips, through the hub and to the exposer's agent.
async fn latency(channel: &ChannelHandle) -> Option<Duration> {
    let pings = async {
        let mut times = Vec::with_capacity(PINGS);
        for _ in 0..PINGS {
            times.push(channel.ping().await);
        }
        times.sort();
        times[PINGS / 2]
    };
    timeout(PINGS_TIMEOUT, pings).await.ok()
}

async fn measure(reached: &Reached) -> Result<Speed> {
    let failed = |error: &dyn std::fmt::Display| Error::new(ErrorKind::ExposerOffline, error);
    let up = async {
        let (stream, _) = reached.open_for(Purpose::Sink).await?;
        let begun = Instant::now();
        let sent = async {
            write_zeros(&stream, MAX_SOURCE_BYTES, |_| begun.elapsed() < SPEED_TIME).await?;
            stream.finish()?;
            read_to_end(&stream, 8).await
        };
        let count = sent.await.map_err(|error| failed(&error))?;
        let count = <[u8; 8]>::try_from(count.as_ref()).map_err(|_| failed(&"no count came"))?;
        Result::Ok(rate(u64::from_be_bytes(count), begun))
    };
    let up = timeout(SPEED_TIMEOUT, up).await.map_err(|_| failed(&"it takes too long"))??;
    let down = async {
        let first = fetch(reached, FIRST_BYTES).await?;
        let wanted = Duration::from_secs_f64((FIRST_BYTES as f64 / first).min(60.0));
        let times = SPEED_TIME.as_secs_f64() / wanted.as_secs_f64();
        if times <= 1.0 {
            return Ok(first);
        }
        // A power of two: how much is fetched says no more than is needed.
        let mut bytes = FIRST_BYTES;
        while bytes < MAX_SOURCE_BYTES && (bytes as f64) < FIRST_BYTES as f64 * times {
            bytes *= 2;
        }
        fetch(reached, bytes).await
    };
    let down = timeout(SPEED_TIMEOUT, down).await.map_err(|_| failed(&"it takes too long"))??;
    Ok(Speed { up, down })
}

/// Has the exposer send so many bytes; returns how many came in a second.
async fn fetch(reached: &Reached, bytes: u64) -> Result<f64> {
    let failed = |error: &dyn std::fmt::Display| Error::new(ErrorKind::ExposerOffline, error);
    let (stream, _) = reached.open_for(Purpose::Source).await?;
    let begun = Instant::now();
    let fetched = async {
        stream.write_all(Bytes::copy_from_slice(&bytes.to_be_bytes())).await?;
        stream.finish()?;
        drain(&stream, bytes).await
    };
    let count = fetched.await.map_err(|error| failed(&error))?;
    if count == bytes {
        Ok(rate(count, begun))
    } else {
        Err(failed(&"fewer bytes came than were asked for"))
    }
}

/// Bytes in a second, since `begun`.
fn rate(bytes: u64, begun: Instant) -> f64 {
    bytes as f64 / begun.elapsed().as_secs_f64().max(1e-6)
}

// In words.

fn about_target(report: &CheckReport, name: &ServiceName) -> Vec<Finding> {
    let mut findings = Vec::new();
    let kind = ErrorKind::TargetUnreachable;
    let of_target = |micros| millis(Duration::from_micros(micros));
    if let Some(resolved) = report.resolved {
        let addresses = match resolved.addresses {
            1 => "1 address".to_owned(),
            count => format!("{count} addresses"),
        };
        findings.push(Finding::ok(
            "dns",
            "DNS OK",
            format_args!("{addresses}, {}", of_target(resolved.micros)),
        ));
    }
    let tcp = |text: &str| Finding::fail("tcp", "TCP", kind, text);
    findings.push(match report.outcome {
        Outcome::Connected => {
            Finding::ok("tcp", "TCP OK", of_target(report.connected_micros.unwrap_or(0)))
        }
        Outcome::NameUnknown => Finding::fail(
            "dns",
            "DNS",
            kind,
            "the target's name does not resolve on the exposer's machine",
        )
        .hint(format_args!(
            "there: is the name right? `connect expose HOST:PORT --name {name}` sets another"
        )),
        Outcome::Refused => tcp("the target refuses connections")
            .hint("on the exposer's machine: is the service running, and on that port?"),
        Outcome::TimedOut => tcp("the target does not answer")
            .hint("on the exposer's machine: is the address right, and no firewall between?"),
        Outcome::Unreachable => tcp("the exposer's machine has no way to the target")
            .hint("on the exposer's machine: is its network up, and the address right?"),
    });
    findings.extend(report.tls.as_ref().map(|tls| about_tls(tls, clock::now())));
    let title = title_of(report.protocol.as_str());
    match (&report.warning, &report.detail) {
        (Some(warning), _) => findings.push(Finding::warn("protocol", title, warning)),
        (None, Some(detail)) => findings.push(Finding::ok("protocol", title, detail)),
        (None, None) if report.protocol.as_str() != "tcp" => {
            findings.push(Finding::ok("protocol", title, "answers"));
        }
        (None, None) => {}
    }
    findings
}

fn about_tls(tls: &TlsReport, now: UnixTime) -> Finding {
    let certificate = match tls.names.as_slice() {
        [] => "a certificate without a name".to_owned(),
        [name] => format!("certificate `{name}`"),
        [name, others @ ..] => format!("certificate `{name}` and {} more", others.len()),
    };
    let seen = format!("{}, {certificate}", tls.version);
    let warn = |wrong: &dyn std::fmt::Display, hint: &str| {
        Finding::warn("tls", "TLS", format_args!("{seen}, {wrong}")).hint(hint)
    };
    let renew = "renew it at the target";
    if let Some(until) = tls.not_after
        && until <= now
    {
        return warn(&format_args!("expired on {}", clock::date(until)), renew);
    }
    if let Some(from) = tls.not_before
        && from > now
    {
        let wrong = format!("not valid before {}", clock::date(from));
        return warn(&wrong, "is a clock wrong, here or where it was made?");
    }
    let left = tls.not_after.map(|until| until.saturating_sub(now));
    let days = match left.map(|left| left / DAY) {
        Some(1) => ", 1 day left".to_owned(),
        Some(days) => format!(", {days} days left"),
        None => String::new(),
    };
    if tls.name_matches == Some(false) {
        let wrong = format!("which is not the name that the exposer dials{days}");
        return warn(
            &wrong,
            "clients that verify names need another certificate, or the exposer another target",
        );
    }
    if left.is_some_and(|left| left < EXPIRES_SOON.as_secs()) {
        return warn(&days.trim_start_matches(", "), renew);
    }
    let unknown = match tls.trusted {
        Some(false) => ", signed by no authority that the exposer's machine trusts",
        Some(true) | None => "",
    };
    Finding::ok("tls", "TLS OK", format_args!("{seen}{days}{unknown}"))
}

/// What people call a protocol.
fn title_of(protocol: &str) -> &str {
    match protocol {
        "amqp" => "AMQP",
        "ftp" => "FTP",
        "http" => "HTTP",
        "https" => "HTTPS",
        "imap" => "IMAP",
        "mongodb" => "MongoDB",
        "mysql" => "MySQL",
        "pop3" => "POP3",
        "postgres" => "PostgreSQL",
        "redis" => "Redis",
        "smtp" => "SMTP",
        "ssh" => "SSH",
        "tls" => "TLS inside",
        "vnc" => "VNC",
        "tcp" => "Protocol",
        other => other,
    }
}

fn millis(time: Duration) -> String {
    let millis = time.as_secs_f64() * 1000.0;
    match millis {
        millis if millis < 1.0 => format!("{millis:.2} ms"),
        millis if millis < 10.0 => format!("{millis:.1} ms"),
        millis => format!("{millis:.0} ms"),
    }
}

/// A rate in decimal units.
fn per_second(rate: f64) -> String {
    match rate {
        rate if rate >= 1e9 => format!("{:.1} GB/s", rate / 1e9),
        rate if rate >= 1e6 => format!("{:.0} MB/s", rate / 1e6),
        rate => format!("{:.0} kB/s", rate / 1e3),
    }
}
