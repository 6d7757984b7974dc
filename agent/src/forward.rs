//! A reached service on a port of this machine.

use std::{
    collections::BTreeMap,
    io,
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use connect_spec::{hash::hash, ids::ServiceName};
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

use crate::{
    agent::AbortOnDrop,
    error::{Error, ErrorKind, Result},
    io::splice::{refuse, splice},
    reacher::Reached,
};

/// Ports derived from a name lie here: above the well-known, below the ephemeral ones of Linux.
const DERIVED_PORTS: std::ops::Range<u16> = 10_000..30_000;
/// How many ports after the derived one are tried.
const NEXT_PORTS: u16 = 200;
/// A listener that can accept nothing for want of files waits this long before it tries again.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Listens on a local port and carries each connection to the service. Stops when dropped.
#[derive(Debug)]
pub(crate) struct Forward {
    pub(crate) address: SocketAddr,
    pub(crate) reached: Reached,
    _task: AbortOnDrop,
}

impl Forward {
    pub(crate) fn start(listener: TcpListener, reached: Reached) -> io::Result<Self> {
        let address = listener.local_addr()?;
        let task = tokio::spawn(accept(listener, reached.clone())).abort_handle();
        Ok(Self { address, reached, _task: AbortOnDrop(task) })
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

/// Binds the port of a service: the one asked for, else the saved one, else the service's own, else
/// one derived from the name, else the next free one.
///
/// # Errors
/// [`ErrorKind::Usage`] when the port asked for is taken; [`ErrorKind::Other`] when none is free.
pub(crate) async fn bind(
    name: &ServiceName,
    asked: Option<u16>,
    own: Option<u16>,
    saved: &BTreeMap<ServiceName, u16>,
) -> Result<TcpListener> {
    let listen = |port| TcpListener::bind((Ipv4Addr::LOCALHOST, port));
    if let Some(port) = asked {
        return listen(port).await.map_err(|error| {
            Error::new(ErrorKind::Usage, format_args!("port {port} cannot be used: {error}"))
                .hint("choose another with `--port`, or leave it out for a free one")
        });
    }
    let promised: Vec<u16> =
        saved.iter().filter(|(other, _)| *other != name).map(|(_, port)| *port).collect();
    let derived = derived_port(name);
    let derived = (0..NEXT_PORTS).map(|step| derived.saturating_add(step));
    let free_to_choose = own.into_iter().chain(derived).filter(|port| !promised.contains(port));
    for port in saved.get(name).copied().into_iter().chain(free_to_choose) {
        if let Ok(listener) = listen(port).await {
            return Ok(listener);
        }
    }
    listen(0).await.map_err(|error| {
        Error::new(ErrorKind::Other, format_args!("no local port is free: {error}"))
    })
}

fn derived_port(name: &ServiceName) -> u16 {
    let [high, low, ..] = hash("port", &[name.as_str().as_bytes()]);
    let span = DERIVED_PORTS.end - DERIVED_PORTS.start - NEXT_PORTS;
    DERIVED_PORTS.start + u16::from_be_bytes([high, low]) % span
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn port_of(
        asked: Option<u16>,
        own: Option<u16>,
        saved: &[(&str, u16)],
    ) -> Result<(TcpListener, u16)> {
        let saved = saved.iter().map(|(name, port)| (name.parse().expect("name"), *port)).collect();
        let listener = bind(&"prod-db".parse().expect("name"), asked, own, &saved).await?;
        let port = listener.local_addr()?.port();
        Ok((listener, port))
    }

    #[tokio::test]
    async fn ports_are_chosen_in_the_promised_order() {
        let (taken, busy) = port_of(Some(0), None, &[]).await.expect("a free port");
        let (free, own) = port_of(Some(0), None, &[]).await.expect("a free port");
        drop(free);
        let derived = derived_port(&"prod-db".parse().expect("name"));

        assert_eq!(port_of(Some(busy), None, &[]).await.expect_err("taken").kind, ErrorKind::Usage);
        assert_eq!(port_of(None, Some(own), &[]).await.expect("own").1, own);
        assert_eq!(port_of(None, None, &[("prod-db", own)]).await.expect("saved").1, own);
        // Taken, or promised to another service: the derived one or one of the next.
        for (own, saved) in [(busy, vec![]), (own, vec![("other", own)])] {
            let (_, port) = port_of(None, Some(own), &saved).await.expect("derived");
            assert!((derived..derived + NEXT_PORTS).contains(&port), "{port}");
        }
        drop(taken);
    }
}
