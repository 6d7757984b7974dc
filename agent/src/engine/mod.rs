//! The protocol as a function of bytes, events and time: no socket, no task, no clock.
//!
//! [`channel`] is the state machine of one conversation between a reacher and an exposer;
//! [`rekey`] replaces the keys of a tunnel under it; [`backoff`] says when to try again,
//! [`surroundings`] when at once, [`tampering`] when altered packets are to be reported. The drivers in
//! `io` feed them.

pub(crate) mod backoff;
pub(crate) mod channel;
mod chunks;
pub(crate) mod freshness;
pub(crate) mod rekey;
mod stream;
pub(crate) mod surroundings;
pub(crate) mod tampering;
