//! Every limit of the hub, with its reason. Those that both ends must know are in
//! `connect_spec::limits`.

use std::time::Duration;

/// A request's head must be complete within this time; a browser needs milliseconds, a slow-loris for ever.
pub const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// Sockets that have not authenticated yet: they cost a few KiB each and ten seconds at most.
pub const MAX_UNAUTHENTICATED: usize = 4096;
/// A TLS handshake must be complete within this time.
pub const TLS_TIMEOUT: Duration = Duration::from_secs(10);
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
/// For the last words on a socket: what it has not taken by then, it will not take.
pub const FAREWELL_LIMIT: Duration = Duration::from_secs(5);
