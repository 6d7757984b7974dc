//! The harness of the end-to-end tests: real `connect` and `connect-hub` processes, a real
//! PostgreSQL, real sockets. Nothing of ours is replaced by something that behaves like it.
//!
//! Start reading at [`hub::Hub`] and [`home::Home`]. [`network`] is the network that fails,
//! [`hostile_relay`] the one that lies, [`client`] the agent that does not keep to the rules, [`search`]
//! the eyes that look for plain text, [`load`] the traffic of measurements,
//! [`authority`] who signs certificates.
//! Whatever a test starts ends with it, or at the latest with the test binary ([`process`]).

pub mod authority;
pub mod client;
pub mod home;
pub mod hostile_relay;
pub mod hub;
pub mod lies;
pub mod load;
pub mod meddle;
pub mod network;
pub mod postgres;
pub mod process;
pub mod search;
pub mod services;

use std::{
    sync::LazyLock,
    time::{Duration, Instant},
};

use tokio::runtime::Runtime;

/// Whatever should happen and has not after this time will not.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The runtime of all services, relays and hand-made clients of the test binary.
pub fn runtime() -> &'static Runtime {
    static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .expect("a runtime")
    });
    &RUNTIME
}

/// So many random bytes.
#[must_use]
pub fn random(length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    getrandom::fill(&mut bytes).expect("the system has randomness");
    bytes
}

/// A word that nothing else contains: for canaries and names.
#[must_use]
pub fn random_word() -> String {
    hex::encode(random(8))
}

/// Looks until `condition` holds: for states that nobody announces.
///
/// # Panics
/// When it does not hold for [`PATIENCE`].
#[track_caller]
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "still not so after {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Lets this process have as many files as the system allows.
pub fn raise_file_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("a limit");
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).expect("up to the hard limit");
}
