//! A network between agents and a hub that can be made to stand still, and to break.

use std::{io, net::SocketAddr};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
    task::{AbortHandle, JoinSet},
};

use crate::{hub::Hub, runtime};

/// Forwards TCP connections to a hub, as long as it is let; stops when dropped.
#[derive(Debug)]
pub struct Network {
    address: SocketAddr,
    weather: watch::Sender<Weather>,
    task: AbortHandle,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Weather {
    flowing: bool,
    /// Connections of before this many breaks are gone.
    breaks: u64,
}

impl Network {
    /// Stands in front of a hub.
    #[must_use]
    pub fn start(hub: &Hub) -> Self {
        let listener = runtime().block_on(TcpListener::bind("127.0.0.1:0")).expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        let weather = watch::Sender::new(Weather { flowing: true, breaks: 0 });
        let changes = weather.subscribe();
        let hub = hub.address();
        let task = runtime().spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                tokio::select! {
                    accepted = listener.accept() => {
                        let (agent, _) = accepted.expect("accepting goes on");
                        let changes = changes.clone();
                        connections.spawn(async move {
                            // Either side may vanish at any time.
                            let _ = pass(agent, hub, changes).await;
                        });
                    }
                    Some(_) = connections.join_next() => {}
                }
            }
        });
        Self { address, weather, task: task.abort_handle() }
    }

    /// For `connect init --hub`.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// From now on no byte passes, in neither direction, and no connection ends.
    pub fn stall(&self) {
        self.weather.send_modify(|weather| weather.flowing = false);
    }

    /// What waited passes, and all that follows.
    pub fn flow(&self) {
        self.weather.send_modify(|weather| weather.flowing = true);
    }

    /// Resets every connection. New ones are accepted, as on another way through the network.
    pub fn cut(&self) {
        self.weather.send_modify(|weather| weather.breaks += 1);
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// One connection, until either end of it or the network ends it.
async fn pass(
    agent: TcpStream,
    hub: SocketAddr,
    mut changes: watch::Receiver<Weather>,
) -> io::Result<()> {
    let breaks = changes.borrow_and_update().breaks;
    let hub = TcpStream::connect(hub).await?;
    for tcp in [&agent, &hub] {
        tcp.set_nodelay(true)?;
        // Dropped, it ends with a reset.
        tcp.set_zero_linger()?;
    }
    let (agent_read, agent_write) = agent.into_split();
    let (hub_read, hub_write) = hub.into_split();
    let mut broken = changes.clone();
    tokio::select! {
        there_and_back = async {
            tokio::try_join!(
                forward(agent_read, hub_write, changes.clone()),
                forward(hub_read, agent_write, changes.clone()),
            )
        } => there_and_back.map(|_| ()),
        _ = broken.wait_for(|weather| weather.breaks != breaks) => Ok(()),
    }
}

/// One direction, with its clean end.
async fn forward(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut changes: watch::Receiver<Weather>,
) -> io::Result<()> {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let length = from.read(&mut buffer).await?;
        // The network is gone when nobody can change it any more.
        let flows = changes.wait_for(|weather| weather.flowing).await;
        flows.map_err(|_| io::ErrorKind::ConnectionAborted)?;
        if length == 0 {
            return to.shutdown().await;
        }
        to.write_all(&buffer[..length]).await?;
    }
}
