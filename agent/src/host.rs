//! The process that is the agent of a home: it restores what was exposed and reached, takes commands,
//! and stops cleanly.

use std::{collections::BTreeMap, fs, path::PathBuf, sync::Arc};

use connect_spec::ids::{ServiceId, ServiceName};
use tokio::{
    io::BufReader,
    net::UnixListener,
    sync::{Mutex, Notify},
    task::JoinSet,
};

use crate::{
    agent::{Agent, Options},
    error::{Error, ErrorKind, Result},
    exposer::Exposed,
    forward::Forward,
    home::{Home, HomeLock, SavedExpose, SavedReach},
    local::{self, AgentStatus, Answer, Command, ExposedStatus, ReachedStatus, TrustStatus},
    ports::{self, LocalEnd},
    random,
    target::Target,
};

/// Whether an item comes back at the next start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// It does: the agent was told to.
    Saved,
    /// It does not: it ends with the command that asked for it.
    ThisRun,
}

/// An agent with its local ports and its command socket.
#[derive(Debug)]
pub struct Host {
    agent: Agent,
    forwards: Mutex<BTreeMap<ServiceName, Forward>>,
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
        let agent = Agent::start(home, lock, options)?;
        let core = agent.core();
        let socket = core.home.socket_path()?;
        let listener = local::listen(&socket)?;
        let saved = core.state().clone();
        for expose in saved.exposes {
            match expose.target.parse() {
                Ok(target) => core.exposer.add(Arc::new(Exposed::new(
                    expose.name,
                    expose.service_id,
                    target,
                    expose.allow.into_iter().collect(),
                ))),
                Err(error) => tracing::error!(service = %expose.name, %error, "not restored"),
            }
        }
        let host = Arc::new(Self {
            forwards: Mutex::default(),
            socket,
            listener,
            down: Notify::new(),
            agent,
        });
        for SavedReach { name, port, address } in saved.reaches {
            let at = LocalEnd { port, address };
            if let Err(error) = host.listen_for(&name, at, None).await {
                tracing::error!(service = %name, %error, "not restored");
            }
        }
        Ok(host)
    }

    /// The agent.
    #[must_use]
    pub fn agent(&self) -> &Agent {
        &self.agent
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
                () = self.agent.displaced() => {
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
        self.forwards.lock().await.clear();
        self.agent.stop().await;
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
            Command::Reach { name, port, address, accept_new } => {
                let at = LocalEnd { port, address };
                self.reach(name, at, accept_new, Keep::Saved).await.map(Answer::Reached)
            }
            Command::Unexpose { name } => self.unexpose(&name).await.map(|()| Answer::Done),
            Command::Unreach { name } => self.unreach(&name).await.map(|()| Answer::Done),
            Command::LookAtLog => {
                self.agent.core().workspace.look_at_log().await.map(|()| Answer::Done)
            }
            Command::Rotate => self.agent.rotate().await.map(Answer::Rotated),
            Command::Down => {
                self.down.notify_one();
                Ok(Answer::Done)
            }
        };
        done.unwrap_or_else(Answer::Failed)
    }

    /// Exposes a service and waits until the hub knows it.
    ///
    /// # Errors
    /// As [`Agent::expose`]; a target that cannot be parsed.
    pub async fn expose(
        &self,
        name: ServiceName,
        target: &str,
        allow: Vec<String>,
        take_over: bool,
        keep: Keep,
    ) -> Result<ExposedStatus> {
        let target: Target = target.parse()?;
        let core = self.agent.core();
        // A service that is exposed again is the same service: its id stays.
        let running = core.exposer.all().into_iter().find(|service| service.name == name);
        let service_id =
            running.map_or_else(|| ServiceId(random::bytes()), |service| service.service_id);
        let service =
            Exposed::new(name.clone(), service_id, target.clone(), allow.iter().cloned().collect());
        if keep == Keep::ThisRun {
            // Should this process be killed, the next one tells the hub. Not before the login, which
            // tells of everything that is noted and not exposed.
            self.agent.connected().await?;
            core.note_withdrawn(service_id)?;
        }
        self.agent.expose(service, take_over).await?;
        if keep == Keep::Saved {
            let mut state = core.state();
            state.withdrawn.retain(|withdrawn| *withdrawn != service_id);
            state.exposes.retain(|saved| saved.name != name);
            let target = target.to_string();
            state.exposes.push(SavedExpose { name: name.clone(), target, service_id, allow });
            core.home.save_state(&state)?;
        }
        self.exposed()
            .into_iter()
            .find(|exposed| exposed.name == name)
            .ok_or_else(|| Error::new(ErrorKind::Other, "the service was withdrawn meanwhile"))
    }

    /// Withdraws a service, now and for the next start.
    ///
    /// # Errors
    /// As [`Agent::unexpose`].
    pub async fn unexpose(&self, name: &ServiceName) -> Result<()> {
        let core = self.agent.core();
        let mut withdrawn = self.agent.unexpose(name).await;
        let mut state = core.state();
        let before = state.exposes.len();
        state.exposes.retain(|saved| saved.name != *name);
        if state.exposes.len() < before {
            core.home.save_state(&state)?;
            // The hub hears of it at the next login at the latest.
            if withdrawn.as_ref().is_err_and(|error| error.kind == ErrorKind::ServiceNotFound) {
                withdrawn = Ok(());
            }
        }
        withdrawn
    }

    /// Reaches a service on a local port and waits for its exposer.
    ///
    /// # Errors
    /// [`ErrorKind::ServiceNotFound`] and [`ErrorKind::TrustViolation`], and nothing is kept;
    /// [`ErrorKind::ExposerOffline`], and the port is bound and further tries are made.
    pub async fn reach(
        &self,
        name: ServiceName,
        at: LocalEnd,
        accept_new: bool,
        keep: Keep,
    ) -> Result<ReachedStatus> {
        if accept_new {
            // Begun anew: what is running may have given up on the other agent.
            self.forwards.lock().await.remove(&name);
            self.agent.unreach(&name);
            self.agent.core().unpin(&name);
        }
        let found = self.agent.find(&name).await?;
        // The port of a target that is down may be free because the exposer is on this very machine: taken
        // here, the exposer would dial this agent, and so on without end.
        let down = found.record.target_ok == Some(false);
        let own = found.record.port_hint.filter(|_| !down);
        let is_new = self.listen_for(&name, at, own).await?;
        let ready = self.reached(&name).await.ok_or_else(gone)?.ready().await;
        if let Err(error) = &ready
            && is_new
            && matches!(
                error.kind,
                ErrorKind::TrustViolation | ErrorKind::Refused | ErrorKind::ServiceNotFound
            )
        {
            self.forwards.lock().await.remove(&name);
            self.agent.unreach(&name);
            return Err(error.clone());
        }
        if keep == Keep::Saved {
            let core = self.agent.core();
            let mut state = core.state();
            // Reaching it once more takes no pinned port back.
            let is_saved = state.reaches.iter().any(|saved| saved.name == name);
            if !is_saved || at != LocalEnd::default() {
                let LocalEnd { port, address } = at;
                state.reaches.retain(|saved| saved.name != name);
                state.reaches.push(SavedReach { name: name.clone(), port, address });
                core.home.save_state(&state)?;
            }
        }
        ready?;
        self.all_reached().await.into_iter().find(|reached| reached.name == name).ok_or_else(gone)
    }

    async fn reached(&self, name: &ServiceName) -> Option<crate::Reached> {
        self.forwards.lock().await.get(name).map(|forward| forward.reached.clone())
    }

    /// Binds the port of a service and begins to reach it; false for one that is reached so already.
    async fn listen_for(&self, name: &ServiceName, at: LocalEnd, own: Option<u16>) -> Result<bool> {
        let mut forwards = self.forwards.lock().await;
        if let Some(forward) = forwards.get(name)
            && at.is(forward.address)
        {
            return Ok(false);
        }
        let bound = ports::bind(&self.agent.core().home, name, at, own).await?;
        if let Some(reason) = &bound.passed_over {
            tracing::warn!(service = %name, "it is not on {reason}");
        }
        let forward = Forward::start(bound, self.agent.reach(name))?;
        forwards.insert(name.clone(), forward);
        Ok(true)
    }

    async fn unreach(&self, name: &ServiceName) -> Result<()> {
        let removed = self.forwards.lock().await.remove(name);
        self.agent.unreach(name);
        let core = self.agent.core();
        let mut state = core.state();
        let before = state.reaches.len();
        state.reaches.retain(|saved| saved.name != *name);
        if state.reaches.len() < before {
            core.home.save_state(&state)?;
        } else if removed.is_none() {
            return Err(Error::new(
                ErrorKind::ServiceNotFound,
                format_args!("this agent does not reach `{name}`"),
            )
            .hint("`connect status` lists what it reaches"));
        }
        Ok(())
    }

    fn exposed(&self) -> Vec<ExposedStatus> {
        let exposed = self.agent.core().exposer.status().into_iter();
        exposed
            .map(|(service, streams)| ExposedStatus {
                name: service.name.clone(),
                target: service.target.to_string(),
                service_id: service.service_id,
                streams,
                target_ok: service.target_ok(),
            })
            .collect()
    }

    async fn all_reached(&self) -> Vec<ReachedStatus> {
        let forwards = self.forwards.lock().await;
        let reached = forwards.iter().map(|(name, forward)| {
            let status = forward.reached.status();
            ReachedStatus {
                name: name.clone(),
                address: forward.address.to_string(),
                active: status.active,
                rtt_ms: status.round_trip.map(|time| time.as_secs_f64() * 1000.0),
                streams: status.streams,
                passed_over: forward.passed_over.clone(),
                rekeys: status.rekeys,
                error: status.error,
            }
        });
        reached.collect()
    }

    /// How the agent is doing.
    pub async fn status(&self) -> AgentStatus {
        let identity = self.agent.core().identity();
        let head = identity.trust.head();
        AgentStatus {
            agent_id: identity.agent_id,
            label: identity.label.clone(),
            workspace_id: identity.workspace_id(),
            hub: identity.hub.to_string(),
            connected: self.agent.is_connected(),
            trust: TrustStatus {
                seq: head.seq,
                head: head.hash.to_string(),
                beat_age_s: self.agent.core().beat_age(None).map(|age| age.as_secs()),
                frozen: identity.trust.is_frozen(),
                forked: identity.trust.is_forked(),
                strict: identity.trust.policy().strict,
                epoch: identity.epochs.current().number,
            },
            exposed: self.exposed(),
            reached: self.all_reached().await,
        }
    }
}

fn gone() -> Error {
    Error::new(ErrorKind::Other, "the service was let go of meanwhile")
}
