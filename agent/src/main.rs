//! The `sealane` program: parses its arguments and runs.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

/// SPIFFE mutual TLS for every pod on a node, without sidecars.
#[derive(Parser)]
#[command(version)]
struct Args {
    #[command(subcommand)]
    command: Command,
    /// What to log, in the form of tracing's EnvFilter.
    #[arg(long, global = true, default_value = "info")]
    log: EnvFilter,
}

#[derive(Subcommand)]
enum Command {
    /// Runs the node's proxy until SIGTERM; pods stay captured when it ends.
    Agent {
        /// The configuration; reloaded when it changes and at SIGHUP.
        #[arg(long)]
        config: PathBuf,
    },
    /// Lets every pod go and removes pins, rules, routes and settings; open captured connections may end first, up to
    /// `timeouts.drain`.
    Uninstall {
        /// The agent's configuration.
        #[arg(long)]
        config: PathBuf,
    },
}

fn main() -> ExitCode {
    // A panic must not leave a connection half alive: the process ends, and SO_LINGER resets every peer. By a hook rather than by
    // the profile, which would build everything twice, as tests need to unwind.
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        std::process::abort();
    }));
    let args = Args::parse();
    tracing_subscriber::fmt().json().flatten_event(true).with_env_filter(args.log).init();
    let result = match args.command {
        Command::Agent { config } => sealane::app::run(&config),
        Command::Uninstall { config } => sealane::uninstall::run(&config),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}
