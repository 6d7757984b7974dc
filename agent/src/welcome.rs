//! `connect` alone: what this machine is, and what one can do next. It only looks, so its exit code is 0 in
//! whatever state it finds things; `connect status` is for programs that want to know.

use connect_agent::{
    ErrorKind, Home, Result,
    local::{self, Answer, Command as Ask},
};

use crate::output::{Output, Situation};

pub(crate) async fn run(home: &Home, output: Output) -> Result<()> {
    let situation = match home.load() {
        Err(error) if error.kind == ErrorKind::NotEnrolled => Situation::NotEnrolled,
        Err(error) => return Err(error),
        Ok(identity) => match local::ask(home, &Ask::Status).await? {
            Some(Answer::Status(status)) => Situation::Running(Box::new(status)),
            Some(_) | None => Situation::Stopped(Box::new(identity)),
        },
    };
    output.welcome(home.dir(), &situation);
    Ok(())
}
