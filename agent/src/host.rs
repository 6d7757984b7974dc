//! The process that is the agent of a home: it restores what was exposed and reached, in the home's own
//! workspace and in those that shared something with it, takes commands, and stops cleanly.

use std::{fs, path::PathBuf, sync::Arc};

use connect_spec::ids::ServiceName;
use serde::{Deserialize, Serialize};
use tokio::{
    io::BufReader,
    net::UnixListener,
    sync::{Mutex, Notify},
    task::JoinSet,
};

use crate::{
    agent::{Agent, Options},
    check::Checked,
    error::{Error, ErrorKind, Result},
    home::{Home, HomeLock, one_share},
    local::{self, AgentStatus, Answer, Command, ExposedStatus, ReachedStatus},
    membership::Membership,
    ports::LocalEnd,
};

/// Whether an item comes back at the next start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// It does: the agent was told to.
    Saved,
    /// It does not: it ends with the command that asked for it.
    ThisRun,
}

/// What is to be reached.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Reaching {
    /// The service.
    pub name: ServiceName,
    /// Label or id of the share that it is reached by; otherwise the own workspace comes first.
    pub share: Option<String>,
    /// Where on this machine, if a certain place is wanted.
    pub at: LocalEnd,
    /// Whether another agent may expose the name than when it was last reached.
    pub accept_new: bool,
}

/// The memberships of a home with their command socket.
#[derive(Debug)]
pub struct Host {
    home: Home,
    options: Options,
    own: Membership,
    /// Where the owner of the home is a guest.
    shares: Mutex<Vec<Arc<Membership>>>,
    socket: PathBuf,
    listener: UnixListener,
    down: Notify,
}

impl Host {
    /// Starts the agent of a home and restores what it exposed and reached.
    ///
    /// # Errors
    /// As [`Agent::start`]; or the command socket cannot be made.
    pub async fn start(home: Home, lock: HomeLock, options: Options) -> Result<Arc<Self>> {
        let socket = home.socket_path()?;
        let own = Membership::start(home.clone(), lock, options).await?;
        let host = Arc::new(Self {
            home,
            options,
            own,
            shares: Mutex::default(),
            listener: local::listen(&socket)?,
            socket,
            down: Notify::new(),
        });
        if let Err(error) = host.look_at_shares().await {
            tracing::error!(%error, "the shares are left out");
        }
        Ok(host)
    }

    /// The agent of the home itself.
    #[must_use]
    pub fn agent(&self) -> &Agent {
        self.own.agent()
    }

    /// Begins to be a guest by every share that was joined since.
    async fn look_at_shares(&self) -> Result<()> {
        let mut running = self.shares.lock().await;
        for home in self.home.shares()? {
            if running.iter().any(|share| share.agent().core().home.dir() == home.dir()) {
                continue;
            }
            let dir = home.dir().display().to_string();
            let started = async {
                let lock = home.try_lock()?.ok_or_else(|| {
                    Error::new(ErrorKind::Other, "another process is the agent of this share")
                })?;
                Membership::start(home, lock, self.options).await
            };
            match started.await {
                Ok(membership) => running.push(Arc::new(membership)),
                // One share that is broken must not keep everything else away.
                Err(error) => tracing::error!(%dir, %error, "a share is left out"),
            }
        }
        Ok(())
    }

    /// Ends what the owner of the home reaches by a share, and removes the keys for it.
    async fn leave(&self, wanted: &str) -> Result<()> {
        let share = self.share(wanted).await?;
        share.stop().await;
        self.shares.lock().await.retain(|other| !Arc::ptr_eq(other, &share));
        self.home.forget_share(&share.agent().core().home)
    }

    async fn share(&self, wanted: &str) -> Result<Arc<Membership>> {
        let shares = self.shares.lock().await.clone();
        let is_it = |share: &Arc<Membership>| share.agent().core().identity().is_share(wanted);
        one_share(shares.into_iter().filter(is_it).collect(), wanted)
    }

    /// Takes commands until one says [`Command::Down`], or another process took over.
    ///
    /// # Errors
    /// When another process runs as this agent.
    pub async fn serve(self: &Arc<Self>) -> Result<()> {
        let mut commands = JoinSet::new();
        loop {
            tokio::select! {
                accepted = self.listener.accept() => {
                    if let Ok((socket, _)) = accepted {
                        let host = self.clone();
                        commands.spawn(async move {
                            let mut socket = BufReader::new(socket);
                            if let Some(command) = local::read(&mut socket).await {
                                let answer = host.handle(command).await;
                                local::answer(&mut socket, &answer).await;
                            }
                        });
                    }
                }
                Some(_) = commands.join_next() => {}
                () = self.down.notified() => {
                    // The command that said so waits for its answer.
                    while commands.join_next().await.is_some() {}
                    return Ok(());
                }
                () = self.own.agent().displaced() => {
                    return Err(Error::new(
                        // Not `Other`: who starts failed agents again must not start this one.
                        ErrorKind::Refused,
                        "another process connected as this agent, and the newest one counts",
                    )
                    .hint("is a copy of this home in use somewhere? one home is for one machine"));
                }
            }
        }
    }

    /// Stops the agent and removes its socket.
    pub async fn stop(&self) {
        let shares = self.shares.lock().await.clone();
        let stopping = shares.iter().map(|share| share.stop());
        tokio::join!(self.own.stop(), futures_util::future::join_all(stopping));
        if let Err(error) = fs::remove_file(&self.socket) {
            tracing::debug!(%error, "the command socket was not removed");
        }
    }

    /// Does what a command says.
    pub async fn handle(&self, command: Command) -> Answer {
        let done = match command {
            Command::Status => return Answer::Status(self.status().await),
            Command::Expose { name, target, allow, take_over } => {
                self.expose(name, &target, allow, take_over, Keep::Saved).await.map(Answer::Exposed)
            }
            Command::Reach(reaching) => {
                self.reach(&reaching, Keep::Saved).await.map(Answer::Reached)
            }
            Command::Unexpose { name } => self.unexpose(&name).await.map(|()| Answer::Done),
            Command::Unreach { name } => self.unreach(&name).await.map(|()| Answer::Done),
            Command::LookAtLog => {
                self.agent().core().workspace.look_at_log().await.map(|()| Answer::Done)
            }
            Command::LookAtShares => self.look_at_shares().await.map(|()| Answer::Done),
            Command::Leave { share } => self.leave(&share).await.map(|()| Answer::Done),
            Command::Check { name, share, speed } => {
                self.check(&name, share.as_deref(), speed).await.map(Answer::Checked)
            }
            Command::SelfTest => self.agent().self_test().await.map(Answer::SelfTested),
            Command::Rotate => self.agent().rotate().await.map(Answer::Rotated),
            Command::Down => {
                self.down.notify_one();
                Ok(Answer::Done)
            }
        };
        done.unwrap_or_else(Answer::Failed)
    }

    /// Exposes a service and waits until the hub knows it. Without a name it gets one that says what it is,
    /// or keeps the one that it got so before.
    ///
    /// # Errors
    /// As [`Agent::expose`]; a target that cannot be parsed.
    pub async fn expose(
        &self,
        name: Option<ServiceName>,
        target: &str,
        allow: Vec<String>,
        take_over: bool,
        keep: Keep,
    ) -> Result<ExposedStatus> {
        self.own.expose(name, target, allow, take_over, keep).await
    }

    /// Withdraws a service, now and for the next start.
    ///
    /// # Errors
    /// As [`Agent::unexpose`].
    pub async fn unexpose(&self, name: &ServiceName) -> Result<()> {
        self.own.unexpose(name).await
    }

    /// Reaches a service on a local port and waits for its exposer.
    ///
    /// # Errors
    /// [`ErrorKind::ServiceNotFound`] and [`ErrorKind::TrustViolation`], and nothing is kept;
    /// [`ErrorKind::ExposerOffline`], and the port is bound and further tries are made.
    pub async fn reach(&self, reaching: &Reaching, keep: Keep) -> Result<ReachedStatus> {
        match self.guest_of(&reaching.name, reaching.share.as_deref()).await? {
            Some(share) => share.reach(reaching, keep).await,
            None => self.own.reach(reaching, keep).await,
        }
    }

    /// Looks at a service through its exposer; see [`Agent::check`].
    ///
    /// # Errors
    /// As there; [`ErrorKind::Usage`] for a share that this home did not join.
    pub async fn check(
        &self,
        name: &ServiceName,
        share: Option<&str>,
        speed: bool,
    ) -> Result<Checked> {
        match self.guest_of(name, share).await? {
            Some(share) => share.agent().check(name, speed).await,
            None => self.agent().check(name, speed).await,
        }
    }

    /// By which share a service is reached; `None` for the own workspace, which comes first: whoever gave a
    /// share must not take a name over that is known there.
    async fn guest_of(
        &self,
        name: &ServiceName,
        share: Option<&str>,
    ) -> Result<Option<Arc<Membership>>> {
        if let Some(share) = share {
            if self.agent().core().identity().is_share(share) {
                return Ok(None);
            }
            return self.share(share).await.map(Some);
        }
        let shares = self.shares.lock().await.clone();
        if shares.is_empty() || self.own.knows(name).await {
            return Ok(None);
        }
        match self.agent().find(name).await {
            Err(error) if error.kind == ErrorKind::ServiceNotFound => {}
            Ok(_) | Err(_) => return Ok(None),
        }
        let mut found = Vec::new();
        for share in shares {
            if share.knows(name).await || share.agent().find(name).await.is_ok() {
                found.push(share);
            }
        }
        if found.len() > 1 {
            let labels: Vec<_> =
                found.iter().map(|share| share.agent().core().identity().share_name()).collect();
            return Err(Error::new(
                ErrorKind::Usage,
                format_args!("{} shares have a `{}`", found.len(), name),
            )
            .hint(format_args!("say which: `--share` with one of {}", labels.join(", "))));
        }
        Ok(found.pop())
    }

    /// Reaches a service no longer, now and at the next start.
    async fn unreach(&self, name: &ServiceName) -> Result<()> {
        let own = self.own.unreach(name).await;
        let not_own = |result: &Result<()>| {
            result.as_ref().is_err_and(|error| error.kind == ErrorKind::ServiceNotFound)
        };
        if !not_own(&own) {
            return own;
        }
        for share in self.shares.lock().await.clone() {
            let done = share.unreach(name).await;
            if !not_own(&done) {
                return done;
            }
        }
        own
    }

    /// How the agent is doing.
    pub async fn status(&self) -> AgentStatus {
        let mut status = self.own.status().await;
        for share in self.shares.lock().await.clone() {
            status.shares.push(share.status().await);
        }
        status
    }
}
