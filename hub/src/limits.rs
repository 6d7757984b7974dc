//! Every limit of the hub, with its reason. Those that both ends must know are in
//! `connect_spec::limits`.

use std::time::Duration;

/// A request's head must be complete within this time; a browser needs milliseconds, a slow-loris for ever.
pub const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// Sockets that have not authenticated yet: they cost a few KiB each and [`ENTRY_LIMIT`] at most. One address
/// has no more than half of what is left of them: alone a third.
pub const MAX_UNAUTHENTICATED: usize = 4096;
/// Whoever has not asked for an upgrade, or shown a key, by this time after the connection was accepted is cut
/// off, whatever it sends meanwhile. A control socket has `LOGIN_TIMEOUT` more; a trusted proxy has
/// [`HEAD_TIMEOUT`] for each request.
pub const ENTRY_LIMIT: Duration = Duration::from_secs(10);
/// New connections of one address. At once: 10,000 agents behind one NAT whose hub restarted. A second: half
/// of the TLS handshakes that one core makes.
pub const CONNECTIONS_AT_ONCE: u32 = 10_000;
/// As [`CONNECTIONS_AT_ONCE`], in the long run.
pub const CONNECTIONS_PER_SEC: u32 = 500;
/// Connections of one address that are over a limit and still told so; each costs a TLS handshake. More are
/// dropped when they are accepted.
pub const REFUSALS_AT_ONCE: u32 = 500;
/// As [`REFUSALS_AT_ONCE`], in the long run.
pub const REFUSALS_PER_SEC: u32 = 100;
/// When to come again for want of a place: places are free within [`ENTRY_LIMIT`], most of them at once.
pub const REFUSED_RETRY: Duration = Duration::from_secs(2);
/// Failed tries of one address to authenticate. Nobody guesses 256 bits: this is about work and logs, and an
/// office whose tickets expire together must not lose its hub.
pub const FAILURES_AT_ONCE: u32 = 300;
/// As [`FAILURES_AT_ONCE`], in the long run.
pub const FAILURES_PER_SEC: u32 = 5;
/// An address with more of them may not try for this long.
pub const BAR_TIME: Duration = Duration::from_secs(30);
/// Addresses that are remembered, at a hundred bytes each. Those with a socket always find room.
pub const MAX_ADDRESSES: usize = 4 * MAX_UNAUTHENTICATED;
/// Body of a request. Nothing that the hub serves has a body yet; what will is a short JSON text.
pub const MAX_BODY_BYTES: u64 = 64 * 1024;
/// How often a flood of connections is logged.
pub const FLOOD_LOG_INTERVAL: Duration = Duration::from_secs(10);
/// After `EMFILE` the accept loop rests: accepting again at once would only fail again.
pub const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Head of an HTTP request: three short headers and a ticket.
pub const MAX_HEAD_BYTES: usize = 16 * 1024;

/// What the relay reads at once, and holds at most in each direction of a tunnel: enough that the kernel's
/// copying dominates, small enough that two threads' buffers stay in the second-level cache.
pub const RELAY_BUFFER_BYTES: usize = 64 * 1024;
/// How often a tunnel is looked at for signs of life.
pub const TUNNEL_IDLE_CHECK: Duration = Duration::from_secs(20);
/// So many looks in a row without one byte end the tunnel: after 60 to 80 s. Agents ping every 15 s.
pub const TUNNEL_IDLE_CHECKS: u32 = 3;
/// For the last words on a socket. A peer that lives needs a round trip; one that does not would hold up
/// every restart of the hub for this long.
pub const FAREWELL_LIMIT: Duration = Duration::from_secs(2);

/// Messages waiting to be sent on one control socket. An agent that lets so many pile up is not reading.
pub const MAX_OUTGOING: usize = 1024;
/// Requests of one session that wait for the database; the next one is told to come later.
pub const MAX_WAITING_REQUESTS: usize = 64;
/// One message must leave within this time; a peer that takes nothing for so long is dead.
pub const SEND_LIMIT: Duration = Duration::from_secs(10);
/// Read and write buffer of a control socket: messages are short and rare, sockets are many.
pub const CONTROL_BUFFER_BYTES: usize = 4 * 1024;

/// Tunnels of one agent at once, counting those it asks for and those asked of it. Each may carry thousands
/// of streams; each costs the hub two sockets.
pub const MAX_TUNNELS_PER_AGENT: usize = 4096;
/// Tunnels that one agent may ask for in a second, on average and at once.
pub const OPENS_PER_SEC: u32 = 100;
/// A sealed record: the largest plaintext with its padding, nonce and tag.
pub const MAX_SEALED_BYTES: usize =
    connect_spec::limits::MAX_RECORD_PLAINTEXT_BYTES + 1024 + 24 + 16;
/// A wrap of two 32-byte secrets: an X25519 key, an ML-KEM-768 ciphertext and what it seals, with room.
pub const MAX_WRAP_BYTES: usize = 2048;
/// Rows that a page is filled from; its size in bytes ends it earlier.
pub const PAGE_ROWS: i64 = 64;

/// The tunnels of a revoked agent are cut after this time, unless its peers closed them by then.
pub const REVOKED_GRACE: Duration = Duration::from_secs(1);
/// Witnesses of a workspace whose beats are kept: more than an agent is ever shown.
pub const MAX_WITNESSES: usize = 64;
/// Entries of the trust log in one reply: in base64 they fill a control message. An entry alone is shorter.
pub const LOG_REPLY_BYTES: usize = 48 * 1024;
/// Replies about the log before the login, to the holder of an invite: enough for the longest log.
pub const MAX_LOG_READS: usize = 4096;
/// Agents that are judged in one transaction: ten milliseconds' work.
pub const JUDGED_AT_ONCE: usize = 64;
/// Effects that the database could not do are tried again after this time.
pub const EFFECTS_PAUSE: Duration = Duration::from_secs(1);
/// Bytes of the trust log that are read from the database at once.
pub const LOG_PART_BYTES: usize = 1024 * 1024;
/// Trust states in memory: those of the workspaces that are asked for most; the others are read again.
pub const MAX_TRUST_CACHE_STATES: usize = 4096;
/// Bytes of the logs that these states were made from: one log of the greatest length fits twice.
pub const MAX_TRUST_CACHE_BYTES: usize = 128 * 1024 * 1024;

/// Events wait so long for others, to be written with them.
pub const AUDIT_DELAY: Duration = Duration::from_millis(100);
/// Events of one transaction: others of the workspace wait for it.
pub const AUDIT_BATCH: usize = 512;
/// Workspaces whose events are written at the same time: a few of the database's connections.
pub const AUDIT_WRITERS: usize = 4;
/// Events of one workspace that wait while the database is away: two minutes of the fastest agent's.
/// From half of them on, no new tunnel is opened that would have to be recorded.
pub const MAX_AUDIT_QUEUE: usize = 16_384;
/// Among so many of the latest events a refusal looks for one that it can be counted with.
pub const AUDIT_LOOK_BACK: usize = 16;
/// Rows that are too old are looked for this often.
pub const AUDIT_EXPIRY_INTERVAL: Duration = Duration::from_secs(3600);
/// API keys of a workspace that are in force.
pub const MAX_API_KEYS: i64 = 100;
/// An API key is valid for no longer.
pub const MAX_API_KEY_AGE: Duration = Duration::from_secs(366 * 24 * 3600);
/// API keys that have expired are listed for so long.
pub const EXPIRED_API_KEYS_LISTED: Duration = Duration::from_secs(30 * 24 * 3600);
/// Requests that an API key may make in a second, on average: scripts and dashboards poll slower, and each
/// costs two transactions.
pub const API_KEY_RATE: u32 = 20;
/// Requests that an API key may make at once: the pages of a list.
pub const API_KEY_BURST: u32 = 100;
/// API keys whose rates are remembered; those that rest are forgotten then.
pub const MAX_REST_KEYS: usize = 10_000;
/// Items of a page that is asked for without a limit.
pub const DEFAULT_REST_PAGE: usize = 100;
/// Items of a page: at a few KiB each, about a megabyte.
pub const MAX_REST_PAGE: usize = 500;
/// Name of a kind of event that is asked for: twice what the longest has.
pub const MAX_KIND_BYTES: usize = 64;
/// Digits of a number that is asked for: every reader of JSON keeps so many exactly, and milliseconds last for
/// thirty thousand years.
pub const MAX_NUMBER_DIGITS: usize = 15;
/// Bytes of one workspace that wait at the hub for slow ends, before it gets no new tunnel: a thousand
/// directions that stand still.
pub const MAX_WORKSPACE_HELD_BYTES: usize = 1024 * RELAY_BUFFER_BYTES;

/// Agents are asked to stay away for this long when the hub goes down, plus a random part as long.
pub const RESTART_PAUSE: Duration = Duration::from_millis(500);
/// Everybody must be gone within this time once the hub goes down.
pub const DRAIN_LIMIT: Duration = Duration::from_secs(5);
/// `/readyz` does not wait longer for the database.
pub const READY_LIMIT: Duration = Duration::from_secs(2);

/// The oldest major version of PostgreSQL that the schema is written for.
pub const OLDEST_POSTGRES: u32 = 13;
/// Rows of a backup that go to the database at once.
pub const COPY_CHUNK_BYTES: usize = 64 * 1024;
/// Whoever was refused for want of what is soon free again, such as a turn at the database, is asked to try
/// again after this time. A local database is restarted within one or two of them.
pub const BUSY_RETRY: Duration = Duration::from_secs(1);

/// Connections of the pool: a hub on few cores gains nothing from more, and `max_connections` of a
/// small server leaves room for `psql` and for a second hub during an upgrade.
pub const MAX_CONNECTIONS: u32 = 16;
/// Transactions of one workspace at once: half of the connections, so that a workspace whose agents all
/// ask at the same time leaves as many to the others. Who waits too long for a turn is told `busy`.
pub const TRANSACTIONS_PER_WORKSPACE: usize = MAX_CONNECTIONS as usize / 2;

/// Agents that a workspace ever had: rows of some kilobytes, all of which a new member reads.
pub const MAX_AGENTS_PER_WORKSPACE: i64 = 16_384;
/// Services of a workspace: as many as its agents, for `services` reads them all.
pub const MAX_SERVICES_PER_WORKSPACE: i64 = 16_384;
/// Services of one agent: each is probed by it, and published anew in each epoch.
pub const MAX_SERVICES_PER_AGENT: i64 = 1_024;
/// Invites and shares of a workspace that can still be used: each gets a wrap in each epoch.
pub const MAX_OPEN_CREDENTIALS: usize = 1_024;
/// Control sessions of one agent at once: its own, and those of commands that are run beside it.
pub const MAX_SESSIONS_PER_AGENT: usize = 64;
