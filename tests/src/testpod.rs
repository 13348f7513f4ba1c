//! Running `testpod`, wherever it is.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::de::DeserializeOwned;

use crate::poll;
use crate::report::Event;

/// How long a program has to come up.
const START: Duration = Duration::from_secs(10);

/// A `testpod` that will print one JSON result.
#[derive(Debug)]
pub struct Running {
    child: Option<Child>,
    what: String,
}

impl Running {
    /// Starts a subcommand of `testpod`, `command` being the program in its place. Its standard input ends at
    /// [`Self::result`].
    pub fn start(mut command: Command, args: &[&str]) -> Result<Self> {
        command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped());
        Ok(Self { child: Some(command.spawn().context("cannot run testpod")?), what: args.join(" ") })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().map_or(0, Child::id)
    }

    /// Waits for the result; the program's own time limits bound it.
    pub fn result<T: DeserializeOwned>(mut self) -> Result<T> {
        let out = self.child.take().context("already taken")?.wait_with_output()?;
        let text = String::from_utf8_lossy(&out.stdout);
        ensure!(out.status.success(), "testpod {}: {}, {text}", self.what, out.status);
        serde_json::from_str(text.trim()).with_context(|| format!("testpod {}: {text:?}", self.what))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            end(child);
        }
    }
}

/// A `testpod serve` and what it has told so far; dropping it kills the process.
#[derive(Debug)]
pub struct Server {
    child: Child,
    lines: Mutex<(Receiver<Event>, Vec<Event>)>,
}

impl Server {
    /// Starts `testpod serve`, `tls-serve` or `udp-serve`, `command` being the program in its place; returns once it
    /// listens.
    pub fn start(mut command: Command, which: &str, listen: &str, args: &[&str]) -> Result<Self> {
        command.args([which, "--listen", listen]).args(args);
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("cannot run testpod")?;
        let out = BufReader::new(child.stdout.take().context("no stdout")?);
        let (sender, receiver) = mpsc::channel();
        std::thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                match serde_json::from_str(&line) {
                    // Nobody listens any more: only the pipe must stay empty.
                    Ok(event) => drop(sender.send(event)),
                    Err(error) => eprintln!("testpod serve: {error}: {line}"),
                }
            }
        });
        let server = Self { child, lines: Mutex::new((receiver, Vec::new())) };
        let up = server.wait(START, |event| matches!(event, Event::Listening { .. }));
        up.with_context(|| format!("testpod {which} does not listen on {listen}"))?;
        Ok(server)
    }

    /// Everything that it has told so far.
    pub fn events(&self) -> Vec<Event> {
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        let (receiver, seen) = &mut *lines;
        seen.extend(receiver.try_iter());
        seen.clone()
    }

    /// Waits for the first event, old or new, that `matches`.
    pub fn wait(&self, within: Duration, matches: impl Fn(&Event) -> bool) -> Result<Event> {
        let found = poll::until("the server's event", within, || self.events().into_iter().find(&matches));
        found.with_context(|| format!("events: {:?}", self.events()))
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

fn end(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}

/// A binary of this workspace, beside the one that runs (tests run from `deps/` below it).
pub fn binary(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    let beside = own.ancestors().skip(1).take(2).map(|dir| dir.join(name)).find(|path| path.is_file());
    beside.with_context(|| format!("{name} is not built beside {}", own.display()))
}
