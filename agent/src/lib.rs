//! The agent of Private Connect ZK: expose a private service, reach it by name from elsewhere,
//! end to end encrypted, through a hub that sees ciphertext only.
//!
//! ```no_run
//! # async fn example() -> Result<(), connect_agent::Error> {
//! use connect_agent::{Agent, Home, Options};
//!
//! let home = Home::from_env()?;
//! let lock = home.try_lock()?.expect("no other agent runs in this home");
//! let agent = Agent::start(home, lock, Options::default())?;
//! let database = agent.reach(&"prod-db".parse().expect("a name"));
//! database.ready().await?;
//! let stream = database.open().await?; // AsyncRead + AsyncWrite
//! # drop(stream);
//! # Ok(())
//! # }
//! ```
//!
//! Start reading at [`Agent`]. The protocol's state machine is `engine`, which sees no socket and no
//! clock; `io` drives it; [`exposer`](Exposed) and [`reacher`](Reached) are the two sides of a tunnel.
//! Deliberately absent: a way to speak without encryption, and any key that the hub could have chosen.

mod agent;
mod audit;
mod catch_up;
mod check;
mod clock;
#[cfg(test)]
#[path = "../../crypto/tests/common/mod.rs"]
mod common;
mod directory;
mod doctor;
mod engine;
mod enrol;
mod error;
mod exposer;
mod finding;
mod forward;
mod govern;
mod health;
mod home;
mod host;
mod identity;
mod io;
mod keeper;
pub mod local;
mod membership;
mod naming;
mod port_holder;
mod ports;
mod probe;
mod random;
mod reacher;
mod share;
mod target;
mod target_tls;
mod trust;
mod workspace;

pub use connect_crypto::custody::Passphrase;

pub use agent::{Agent, Options, Rotated, rotate};
pub use audit::{AuditReader, AuditVerdict, RecordedRow};
pub use check::{Checked, Speed};
pub use clock::date;
pub use directory::{
    AgentInfo, ApiKeyInfo, Directory, ListedMember, NewApiKey, ServiceInfo, Verification,
};
pub use doctor::{SelfTest, examine};
pub use engine::rekey::RekeyAfter;
pub use enrol::{FIRST_INVITE, Founded, init, invite, join};
pub use error::{Error, ErrorKind, Result};
pub use exposer::Exposed;
pub use finding::{Finding, FindingState};
pub use govern::{EntryInfo, Governor, InviteInfo, Recovered, Revoked, invites, log, recover};
pub use home::{Home, HomeLock};
pub use host::{Host, Keep, Reaching};
pub use identity::Identity;
pub use io::{tls::HubCa, tunnel::Stream};
pub use ports::{LocalEnd, Loopback, was_reached};
pub use reacher::{ReachStatus, Reached};
pub use share::{GuestInfo, NewShare, ShareInfo, shares};
pub use target::Target;
