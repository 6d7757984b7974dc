//! What the hub counts, in OpenMetrics text for `/metrics`. Labels are kinds: no name, id or address is one.

use std::{fs, sync::atomic::AtomicU64};

use connect_spec::audit::Event;
use nix::unistd::{SysconfVar, sysconf};
use prometheus_client::{
    encoding::text::encode,
    metrics::{counter::Counter, family::Family, gauge::Gauge, info::Info},
    registry::{Registry, Unit},
};

use crate::{doorman::Reason, router::Census};

/// What `/metrics` answers with.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// A counter for each value of one label.
type Kinds = Family<[(&'static str, &'static str); 1], Counter>;

/// What somebody failed to prove.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Credential {
    /// The key of an agent.
    Login,
    /// An invite.
    Invite,
    /// A registration token.
    RegistrationToken,
    /// The ticket of a tunnel.
    Ticket,
    /// A key of the REST interface.
    ApiKey,
}

impl Credential {
    fn name(self) -> &'static str {
        match self {
            Self::Login => "login",
            Self::Invite => "invite",
            Self::RegistrationToken => "registration_token",
            Self::Ticket => "ticket",
            Self::ApiKey => "api_key",
        }
    }
}

/// What only counts upwards. Everything else is asked for when it is shown.
#[derive(Debug, Default)]
pub struct Metrics {
    refused: Kinds,
    dropped: Kinds,
    late: Counter,
    failed: Kinds,
    tls_failed: Counter,
    tunnels_opened: Counter,
    tunnels_refused: Family<[(&'static str, String); 1], Counter>,
}

/// What is so at the moment.
#[derive(Debug, Clone, Copy)]
pub struct Moment {
    /// Sessions and tunnels.
    pub census: Census,
    /// Connections of strangers.
    pub strangers: usize,
    /// Whether the database answers.
    pub database_up: bool,
    /// Connections to the database, and how many of them rest.
    pub pool: (u32, usize),
    /// Whether the hub is on its way to its end.
    pub draining: bool,
    /// Payload bytes that reachers and exposers sent.
    pub relayed: [u64; 2],
}

impl Metrics {
    /// A stranger was told to come later.
    pub fn note_refused(&self, reason: Reason) {
        self.refused.get_or_create(&[("reason", name(reason))]).inc();
    }

    /// A connection was dropped when it was accepted.
    pub fn note_dropped(&self, reason: Reason) {
        self.dropped.get_or_create(&[("reason", name(reason))]).inc();
    }

    /// A stranger was cut off for saying nothing of use in time.
    pub fn note_late(&self) {
        self.late.inc();
    }

    /// Somebody failed to authenticate.
    pub fn note_failure(&self, what: Credential) {
        self.failed.get_or_create(&[("credential", what.name())]).inc();
    }

    /// A TLS handshake failed.
    pub fn note_tls_failure(&self) {
        self.tls_failed.inc();
    }

    /// Something happened in a workspace.
    pub fn note_event(&self, event: &Event) {
        if let Event::TunnelOpened { .. } = event {
            self.tunnels_opened.inc();
        } else if let Event::TunnelRefused { code, count, .. } = event {
            // The name of the code in the protocol.
            let code = serde_json::to_value(code).ok();
            let code = code.as_ref().and_then(|code| code.as_str()).unwrap_or("unknown");
            self.tunnels_refused.get_or_create(&[("code", code.to_owned())]).inc_by(*count);
        }
    }

    /// All of it as text.
    #[must_use]
    pub fn show(&self, moment: &Moment) -> String {
        let mut registry = Registry::default();
        show_process(&mut registry);
        let hub = registry.sub_registry_with_prefix("connect_hub");
        hub.register(
            "build",
            "The program",
            Info::new(vec![("version", env!("CARGO_PKG_VERSION"))]),
        );
        let Moment { census, strangers, database_up, pool: (connections, idle), draining, relayed } =
            *moment;
        hub.register("sessions", "Control sessions that are logged in", gauge(census.sessions));
        hub.register("workspaces_online", "Workspaces with a session", gauge(census.workspaces));
        let stages = [
            ("asked", census.tunnels_asked),
            ("accepted", census.tunnels_accepted),
            ("open", census.tunnels_open),
        ];
        hub.register("tunnels", "Tunnels by stage", gauges("stage", stages));
        hub.register("tunnels_opened", "Tunnels whose ends both came", self.tunnels_opened.clone());
        let refused = self.tunnels_refused.clone();
        hub.register("tunnels_refused", "Tunnels that were refused, by code", refused);
        let by_direction = Kinds::default();
        for (direction, bytes) in ["from_reacher", "from_exposer"].into_iter().zip(relayed) {
            by_direction.get_or_create(&[("direction", direction)]).inc_by(bytes);
        }
        hub.register_with_unit("relayed", "Payload of tunnels", Unit::Bytes, by_direction);
        hub.register(
            "unauthenticated_connections",
            "Connections of agents that have not authenticated yet",
            gauge(strangers),
        );
        hub.register(
            "connections_refused",
            "Requests and logins that were told to come later, by reason",
            self.refused.clone(),
        );
        hub.register(
            "connections_dropped",
            "Connections that were dropped when they came, by reason",
            self.dropped.clone(),
        );
        hub.register(
            "connections_late",
            "Connections that were cut because they did not authenticate in time",
            self.late.clone(),
        );
        hub.register(
            "authentication_failures",
            "Failed tries to authenticate, by what did not hold",
            self.failed.clone(),
        );
        hub.register(
            "tls_handshakes_failed",
            "TLS handshakes that failed or took too long",
            self.tls_failed.clone(),
        );
        hub.register("draining", "Whether the hub is going down", gauge(usize::from(draining)));
        let database_up = gauge(usize::from(database_up));
        hub.register("database_up", "Whether the database answers", database_up);
        let used = (connections as usize).saturating_sub(idle);
        hub.register(
            "database_connections",
            "Connections to the database",
            gauges("state", [("used", used), ("idle", idle)]),
        );
        let mut text = String::new();
        match encode(&mut text, &registry) {
            Ok(()) => text,
            // Writing to a string does not fail.
            Err(_) => String::new(),
        }
    }
}

/// What the kernel says of this process, under the names that Prometheus has for it.
fn show_process(registry: &mut Registry) {
    let pages = fs::read_to_string("/proc/self/statm").ok().and_then(|text| {
        let resident = text.split_whitespace().nth(1)?;
        resident.parse::<usize>().ok()
    });
    let page_bytes = sysconf(SysconfVar::PAGE_SIZE).ok().flatten();
    let page_bytes = page_bytes.and_then(|bytes| usize::try_from(bytes).ok());
    if let (Some(pages), Some(page_bytes)) = (pages, page_bytes) {
        registry.register(
            "process_resident_memory_bytes",
            "Memory that is resident",
            gauge(pages * page_bytes),
        );
    }
    if let Ok(files) = fs::read_dir("/proc/self/fd") {
        // The directory that is being read is one of them.
        registry.register("process_open_fds", "Open files", gauge(files.count().saturating_sub(1)));
    }
}

fn name(reason: Reason) -> &'static str {
    match reason {
        Reason::Full => "full",
        Reason::Share => "share",
        Reason::Rate => "rate",
        Reason::Failures => "failures",
    }
}

/// What is so, as a gauge.
fn gauge(value: usize) -> Gauge<u64, AtomicU64> {
    let gauge = Gauge::default();
    gauge.set(value as u64);
    gauge
}

fn gauges<const N: usize>(
    label: &'static str,
    values: [(&'static str, usize); N],
) -> Family<[(&'static str, &'static str); 1], Gauge<u64, AtomicU64>> {
    let family = Family::<_, Gauge<u64, AtomicU64>>::default();
    for (kind, value) in values {
        family.get_or_create(&[(label, kind)]).set(value as u64);
    }
    family
}
