//! A reached service on a port of this machine.

use std::{io, net::SocketAddr, time::Duration};

use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

use crate::{
    agent::AbortOnDrop,
    io::splice::{refuse, splice},
    ports::Bound,
    reacher::Reached,
};

/// A listener that can accept nothing for want of files waits this long before it tries again.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Listens on a local port and carries each connection to the service. Stops when dropped.
#[derive(Debug)]
pub(crate) struct Forward {
    pub(crate) address: SocketAddr,
    pub(crate) reached: Reached,
    /// Why it is not on the port that one would expect.
    pub(crate) passed_over: Option<String>,
    _task: AbortOnDrop,
}

impl Forward {
    pub(crate) fn start(bound: Bound, reached: Reached) -> io::Result<Self> {
        let Bound { listener, passed_over } = bound;
        let address = listener.local_addr()?;
        let task = tokio::spawn(accept(listener, reached.clone())).abort_handle();
        Ok(Self { address, reached, passed_over, _task: AbortOnDrop(task) })
    }
}

async fn accept(listener: TcpListener, reached: Reached) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((tcp, _)) => {
                    connections.spawn(carry(tcp, reached.clone()));
                }
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn carry(tcp: TcpStream, reached: Reached) {
    let opened = match tcp.set_nodelay(true) {
        Ok(()) => reached.open().await,
        Err(error) => Err(error.into()),
    };
    match opened {
        Ok(stream) => splice(tcp, &stream).await,
        Err(error) => {
            tracing::warn!(%error, "a client was turned away");
            refuse(tcp);
        }
    }
}
