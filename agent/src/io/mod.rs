//! The tokio drivers: sockets and tasks around the state machines of `engine`.

pub(crate) mod dial;
pub(crate) mod hub;
pub(crate) mod packets;
pub(crate) mod sockets;
pub(crate) mod splice;
pub(crate) mod tls;
pub(crate) mod tunnel;
