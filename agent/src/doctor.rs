//! Looks for what keeps an agent from working, on this machine and on the way through the hub, and says for
//! each thing what to do about it.

use std::{
    fs,
    net::{Ipv4Addr, TcpListener as StdListener},
    os::unix::fs::MetadataExt,
    path::Path,
    time::{Duration, Instant},
};

use connect_spec::{
    ids::{ServiceId, ServiceName},
    limits::BEAT_STALE,
    objects::UnixTime,
    record::Purpose,
};
use nix::sys::resource::{Resource, getrlimit};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    time::timeout,
};

use crate::{
    agent::{AbortOnDrop, Agent, Options},
    clock,
    directory::Directory,
    error::{Error, ErrorKind, Result},
    exposer::Exposed,
    finding::Finding,
    home::Home,
    identity::Identity,
    io::{
        dial::{HubUrl, Look},
        tunnel::CLOSE_TIMEOUT,
    },
    local::{self, AgentStatus, Answer, Command},
    port_holder, ports, random,
    reacher::Reached,
    target::Target,
};

/// A clock that is wrong by more is worth a word: certificates of invites are counted in hours.
const CLOCK_SKEW: Duration = Duration::from_secs(30);
/// An agent that carries a thousand connections needs two files for each.
const FEW_FILES: u64 = 4096;
/// Membership that ends sooner is a warning.
const ENDS_SOON: Duration = Duration::from_secs(14 * 24 * 3600);
/// The whole of a self-test: two handshakes' worth of patience.
const SELF_TEST_TIMEOUT: Duration = Duration::from_secs(30);
/// What goes through the tunnel and has to come back.
const SELF_TEST_BYTES: usize = 64 * 1024;

/// What a self-test measured.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct SelfTest {
    /// One encrypted round trip, in milliseconds.
    pub round_trip_ms: f64,
}

/// Looks at everything, from the home to a tunnel through the hub.
pub async fn examine(home: &Home) -> Vec<Finding> {
    let mut findings = Vec::new();
    if let Err(error) = home.check_enrolled() {
        findings.push(failed("home", "Home", &error));
        findings.push(files());
        return findings;
    }
    findings.extend(permissions(home));
    let identity = match home.load_with_log() {
        Ok((identity, _)) => identity,
        Err(error) => {
            findings.push(failed("keys", "Keys", &error));
            findings.push(files());
            return findings;
        }
    };
    findings.push(Finding::ok("keys", "Keys", format_args!("agent {}", identity.agent_id.short())));
    findings.push(membership(&identity, clock::now()));
    findings.push(saved(home));
    let status = local::ask(home, &Command::Status).await;
    let status = match status {
        Ok(Some(Answer::Status(status))) => Ok(Some(status)),
        Ok(Some(_)) => {
            Err(Error::new(ErrorKind::NoAgent, "the running agent is of another version"))
        }
        Ok(None) => Ok(None),
        Err(error) => Err(error),
    };
    findings.push(agent(&status));
    let status = status.ok().flatten();
    findings.push(trust(&identity, status.as_ref()));
    findings.extend(ports(home, status.as_ref()));
    findings.push(files());
    let hub_is_there = hub(&identity, &mut findings).await;
    if !hub_is_there {
        return findings;
    }
    match Directory::open(home).await {
        Ok(_) => findings.push(Finding::ok("login", "Login", "the hub takes this agent")),
        Err(error) => {
            findings.push(failed("login", "Login", &error));
            return findings;
        }
    }
    findings.push(self_test(home, &identity, status.is_some()).await);
    findings
}

fn failed(what: &str, title: &str, error: &Error) -> Finding {
    let finding = Finding::fail(what, title, error.kind, error);
    match &error.hint {
        Some(hint) => finding.hint(hint),
        None => finding,
    }
}

/// Files and directories that others can enter or read, or that belong to somebody else.
fn permissions(home: &Home) -> Vec<Finding> {
    let own = nix::unistd::geteuid().as_raw();
    let mut wrong = Vec::new();
    let fault = |path: &Path, mask: u32, mode: &str, code| {
        let metadata = fs::symlink_metadata(path).ok()?;
        let path = path.display();
        let finding = |text: String, fix: String| {
            Some(
                Finding::fail("permissions", "Permissions", code, text)
                    .hint(format_args!("run `{fix}`")),
            )
        };
        if metadata.uid() != own {
            let text = format!("`{path}` belongs to user {}, not to {own}", metadata.uid());
            return finding(text, format!("sudo chown {own} '{path}'"));
        }
        if metadata.mode() & mask != 0 {
            let text = format!("`{path}` is open to other users");
            return finding(text, format!("chmod {mode} '{path}'"));
        }
        None
    };
    for dir in [home.dir().to_owned(), home.path("trust"), home.path("evidence")] {
        wrong.extend(fault(&dir, 0o077, "700", ErrorKind::TrustViolation));
    }
    for name in ["agent.key", "epochs.key", "signer.key", "agent.log", "state.json", "ports.json"] {
        wrong.extend(fault(&home.path(name), 0o077, "600", ErrorKind::TrustViolation));
    }
    if wrong.is_empty() {
        let text = format!("`{}` and its keys are this user's alone", home.dir().display());
        wrong.push(Finding::ok("permissions", "Permissions", text));
    }
    wrong
}

/// Whether this agent's own chain holds, by the log that it has.
fn membership(identity: &Identity, now: UnixTime) -> Finding {
    let title = "Membership";
    let presented = identity.noise.presented.clone();
    match identity.trust.verify_peer(identity.agent_id, presented, now) {
        Err(error) => Finding::fail(
            "membership",
            title,
            ErrorKind::TrustViolation,
            format_args!("others do not trust this agent any more: {error}"),
        )
        .hint("ask a signer; if it was revoked, join again with an empty home"),
        Ok(own) => match own.certificate().not_after {
            None => Finding::ok("membership", title, "the chain holds, without an end"),
            Some(until) => {
                let text = format!("the chain holds, provisionally until {}", clock::date(until));
                if until.saturating_sub(now) < ENDS_SOON.as_secs() {
                    Finding::warn("membership", title, text)
                        .hint("it becomes lasting when an agent of a signer is online")
                } else {
                    Finding::ok("membership", title, text)
                }
            }
        },
    }
}

/// What comes back at the next start.
fn saved(home: &Home) -> Finding {
    match home.load_state().and_then(|state| ports::remembered(home).map(|_| state)) {
        Ok(state) => Finding::ok(
            "state",
            "State",
            format_args!(
                "{} exposed and {} reached are remembered",
                state.exposes.len(),
                state.reaches.len()
            ),
        ),
        Err(error) => failed("state", "State", &error),
    }
}

fn agent(status: &Result<Option<AgentStatus>>) -> Finding {
    let (what, title) = ("agent", "Agent");
    match status {
        Err(error) => failed(what, title, error),
        Ok(None) => {
            Finding::warn(what, title, "none is running").hint("`connect up --detach` starts it")
        }
        Ok(Some(status)) if status.version != env!("CARGO_PKG_VERSION") => Finding::warn(
            what,
            title,
            format_args!(
                "it runs version {:?}, this is {}",
                status.version,
                env!("CARGO_PKG_VERSION")
            ),
        )
        .hint("`connect down`, then `connect up --detach`"),
        Ok(Some(status)) if !status.connected => {
            let text = status.error.as_ref().map_or_else(
                || "it runs, and is not connected to its hub".to_owned(),
                |cause| format!("it runs, and is not connected to its hub: {cause}"),
            );
            Finding::warn(what, title, text).hint("it goes on trying; its log says when it tried")
        }
        Ok(Some(_)) => Finding::ok(what, title, "runs and is connected"),
    }
}

fn trust(identity: &Identity, status: Option<&AgentStatus>) -> Finding {
    let (what, title) = ("trust", "Trust log");
    let seq = identity.trust.head().seq;
    if identity.trust.is_frozen() {
        return Finding::fail(
            what,
            title,
            ErrorKind::TrustViolation,
            format_args!("entry {seq} is one that this version cannot read: no new tunnels"),
        )
        .hint("update `connect` on this machine");
    }
    if identity.trust.is_forked() {
        return Finding::warn(what, title, format_args!("it forked; this agent is at entry {seq}"))
            .hint("`connect trust log` shows it; an owner settles it: `connect trust settle`");
    }
    let age = status.map(|status| status.trust.beat_age_s);
    match age {
        Some(Some(age)) if age > BEAT_STALE.as_secs() => Finding::warn(
            what,
            title,
            format_args!("entry {seq}, which no witness confirmed for {age} s"),
        )
        .hint("is another agent online? A hub that holds news back looks like this too"),
        Some(Some(age)) => {
            Finding::ok(what, title, format_args!("entry {seq}, confirmed {age} s ago"))
        }
        Some(None) | None => Finding::ok(what, title, format_args!("entry {seq}")),
    }
}

/// The local ports of reached services: held by the running agent, or free for the next one.
fn ports(home: &Home, status: Option<&AgentStatus>) -> Vec<Finding> {
    // What cannot be read is said elsewhere.
    let (Ok(ports), Ok(state)) = (ports::remembered(home), home.load_state()) else {
        return Vec::new();
    };
    let mut taken = Vec::new();
    let mut count = 0_usize;
    for reach in &state.reaches {
        let Some(address) = ports.get(&reach.name) else { continue };
        count += 1;
        let held = status.is_some_and(|status| {
            let mut reached = status.reached.iter();
            reached
                .any(|reached| reached.name == reach.name && reached.address == address.to_string())
        });
        if let (false, Err(error)) = (held, StdListener::bind(address)) {
            let reason = port_holder::reason(*address, &error);
            let text =
                format!("port {}, where `{}` is reached, {reason}", address.port(), reach.name);
            let hint =
                format!("stop that, or choose another: connect reach {} --port PORT", reach.name);
            taken.push(Finding::warn("ports", "Local ports", text).hint(hint));
        }
    }
    if taken.is_empty() && count > 0 {
        let text = format!("{count} remembered, free or held by this agent");
        taken.push(Finding::ok("ports", "Local ports", text));
    }
    taken
}

fn files() -> Finding {
    match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok((_, hard)) if hard < FEW_FILES => {
            Finding::warn("files", "Open files", format_args!("this user may open {hard} at most"))
                .hint(
                    "each connection needs two: raise it, such as `LimitNOFILE=` in a systemd unit",
                )
        }
        Ok((_, hard)) => Finding::ok("files", "Open files", format_args!("up to {hard}")),
        Err(error) => Finding::warn("files", "Open files", error),
    }
}

/// Whether the hub answers, and what its clock says. False when it does not answer.
async fn hub(identity: &Identity, findings: &mut Vec<Finding>) -> bool {
    let looked = match HubUrl::parse(&identity.hub, identity.hub_ca.as_ref()) {
        Ok(hub) => hub.look().await.map(|look| (hub, look)),
        Err(error) => Err(error),
    };
    let (hub, Look { verified_by, took, date }) = match looked {
        Ok(looked) => looked,
        Err(error) => {
            findings.push(failed("hub", "Hub", &error));
            return false;
        }
    };
    let millis = took.as_secs_f64() * 1000.0;
    findings.push(Finding::ok(
        "hub",
        "Hub",
        format_args!("{hub} answers in {millis:.0} ms, {verified_by}"),
    ));
    findings.push(clock_against(date.as_deref().and_then(http_date), clock::now()));
    true
}

fn clock_against(hub: Option<UnixTime>, own: UnixTime) -> Finding {
    let Some(hub) = hub else {
        return Finding::ok("clock", "Clock", "the hub shows no time to compare with");
    };
    let skew = hub.abs_diff(own);
    let text = format!("{skew} s from the hub's");
    if skew <= CLOCK_SKEW.as_secs() {
        return Finding::ok("clock", "Clock", text);
    }
    Finding::warn("clock", "Clock", text)
        .hint("which one is wrong? `timedatectl` shows whether this machine's is synchronised")
}

/// Seconds since 1970 of a date as HTTP writes it (RFC 9110 section 5.6.7, the one form that is made).
fn http_date(text: &str) -> Option<UnixTime> {
    const MONTHS: [&str; 12] =
        ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let (_, date) = text.split_once(", ")?;
    let mut parts = date.strip_suffix(" GMT")?.split([' ', ':']);
    let mut next = || parts.next();
    let day = next()?.parse().ok()?;
    let month = next()?;
    let month = u8::try_from(MONTHS.iter().position(|name| *name == month)? + 1).ok()?;
    let year = next()?.parse().ok()?;
    let (hour, minute, second) =
        (next()?.parse().ok()?, next()?.parse().ok()?, next()?.parse().ok()?);
    let date = time::Date::from_calendar_date(year, month.try_into().ok()?, day).ok()?;
    let at = date.with_hms(hour, minute, second).ok()?.assume_utc();
    u64::try_from(at.unix_timestamp()).ok()
}

/// A tunnel from this agent to itself, through the hub, by the agent that runs or by one for the moment.
async fn self_test(home: &Home, identity: &Identity, running: bool) -> Finding {
    let (what, title) = ("self_test", "Self-test");
    let role = identity.noise.presented.certificate.object().role;
    if !(role.may_reach() && role.may_expose()) {
        return Finding::ok(what, title, "left out: this agent may not both expose and reach");
    }
    let tested = if running {
        match local::ask(home, &Command::SelfTest).await {
            Ok(Some(Answer::SelfTested(tested))) => Ok(tested),
            Ok(_) => Err(Error::new(
                ErrorKind::NoAgent,
                "the running agent ended, or is of another version",
            )),
            Err(error) => Err(error),
        }
    } else {
        by_a_short_agent(home).await
    };
    match tested {
        Ok(SelfTest { round_trip_ms }) => Finding::ok(
            what,
            title,
            format_args!("an encrypted tunnel to itself, {round_trip_ms:.1} ms through the hub"),
        ),
        Err(error) => failed(what, title, &error),
    }
}

async fn by_a_short_agent(home: &Home) -> Result<SelfTest> {
    let Some(lock) = home.try_lock()? else {
        return Err(Error::new(ErrorKind::NoAgent, "a process holds the home but does not answer")
            .hint("stop it, and try again"));
    };
    let agent = Agent::start(home.clone(), lock, Options::default())?;
    let tested = agent.self_test().await;
    agent.stop().await;
    tested
}

impl Agent {
    /// Exposes an echo under a name of the moment to this agent alone, reaches it through the hub, and sees
    /// that bytes come back as they went. Nothing of it stays.
    ///
    /// # Errors
    /// What went wrong first.
    pub async fn self_test(&self) -> Result<SelfTest> {
        let name: ServiceName = format!("self-test-{}", hex::encode(random::bytes::<8>()))
            .parse()
            .expect("hex makes a name");
        let tested =
            timeout(SELF_TEST_TIMEOUT, self.test_under(&name)).await.unwrap_or_else(|_| {
                Err(Error::new(
                    ErrorKind::HubUnreachable,
                    format_args!("no answer in {} s", SELF_TEST_TIMEOUT.as_secs()),
                ))
            });
        if let Err(error) = self.unexpose(&name).await {
            tracing::debug!(%error, "the next login tells the hub");
        }
        self.core().unpin(&name);
        tested
    }

    async fn test_under(&self, name: &ServiceName) -> Result<SelfTest> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let target: Target = listener.local_addr()?.to_string().parse()?;
        let echo = tokio::spawn(async move {
            // One look at the target, and one stream.
            while let Ok((mut tcp, _)) = listener.accept().await {
                let (mut read, mut write) = tcp.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
            }
        });
        let _echo = AbortOnDrop(echo.abort_handle());
        let service_id = ServiceId(random::bytes());
        let allow = [self.agent_id().to_string()].into();
        self.connected().await?;
        // Should this process be killed, the next one tells the hub.
        self.core().note_withdrawn(service_id)?;
        self.expose(Exposed::new(name.clone(), service_id, target, allow), false).await?;
        let reached = Reached::start(self.shared_core(), name.clone());
        let tested = round_trip(&reached).await;
        if let Some(channel) = reached.stop() {
            let _ = timeout(CLOSE_TIMEOUT, channel.closed()).await;
        }
        tested
    }
}

async fn round_trip(reached: &Reached) -> Result<SelfTest> {
    reached.ready().await?;
    let (stream, channel) = reached.open_for(Purpose::Target).await?;
    let sent: Vec<u8> = (0..SELF_TEST_BYTES).map(|_| random::bytes::<1>()[0]).collect();
    let (mut read, mut write) = tokio::io::split(stream);
    let writing = async {
        write.write_all(&sent).await?;
        write.shutdown().await
    };
    let mut came_back = Vec::new();
    let reading = read.read_to_end(&mut came_back);
    tokio::try_join!(writing, reading)?;
    if came_back != sent {
        return Err(Error::trust("other bytes came back than were sent"));
    }
    let begun = Instant::now();
    channel.ping().await;
    Ok(SelfTest { round_trip_ms: begun.elapsed().as_secs_f64() * 1000.0 })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::finding::FindingState;

    #[test]
    fn dates_of_http_are_read_and_others_are_not() {
        assert_eq!(http_date("Sun, 06 Nov 1994 08:49:37 GMT"), Some(784_111_777));
        assert_eq!(http_date("Thu, 01 Jan 1970 00:00:00 GMT"), Some(0));
        for bad in [
            "",
            "Sun, 06 Nov 1994 08:49:37",
            "Sun, 31 Feb 1994 08:49:37 GMT",
            "Sunday, 06-Nov-94 08:49:37 GMT",
            "Sun, 06 Nov 1969 08:49:37 GMT",
            "Sun, 06 Nov 1994 25:49:37 GMT",
        ] {
            assert_eq!(http_date(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_clock_is_warned_of_from_half_a_minute_on_either_way() {
        let check = |hub, own, state| assert_eq!(clock_against(hub, own).state, state);
        check(Some(1000), 1030, FindingState::Ok);
        check(Some(1000), 1031, FindingState::Warn);
        check(Some(1031), 1000, FindingState::Warn);
        check(None, 1000, FindingState::Ok);
    }
}
