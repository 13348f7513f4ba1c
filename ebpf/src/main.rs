//! Sealane's kernel programs: entry points only, each a table from outcome to verdict.
//!
//! The capture is "mark, loop, lookup": [`connect`] marks an enrolled pod's connection to the mesh, a rule and a route in
//! the pod loop the marked SYN over `lo`, and [`lookup`] hands it to the agent's listener inside the pod.
#![no_std]
#![no_main]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]

mod connect;
mod count;
mod ctx;
mod guard;
mod lookup;
mod maps;
mod peername;
mod sockops;

use aya_ebpf::macros::{cgroup_sock_addr, cgroup_sockopt, sk_lookup, sock_ops};
use aya_ebpf::programs::{SkLookupContext, SockAddrContext, SockOpsContext, SockoptContext};
use sealane_common::reason::Reason;

use crate::lookup::Verdict;

const ALLOW: i32 = 1;
const REFUSE: i32 = 0;
const SK_DROP: u32 = 0;
const SK_PASS: u32 = 1;

#[cgroup_sock_addr(connect4)]
fn sealane_connect4(ctx: SockAddrContext) -> i32 {
    connect_verdict(&ctx, ctx::destination4(&ctx))
}

#[cgroup_sock_addr(connect6)]
fn sealane_connect6(ctx: SockAddrContext) -> i32 {
    connect_verdict(&ctx, ctx::destination6(&ctx))
}

#[inline(always)]
fn connect_verdict(ctx: &SockAddrContext, to: ctx::Endpoint) -> i32 {
    match connect::try_connect(ctx, to) {
        None => ALLOW,
        Some(Reason::MarkFailed) => {
            count::add(Reason::MarkFailed);
            REFUSE
        }
        Some(reason) => {
            count::add(reason);
            ALLOW
        }
    }
}

#[cgroup_sockopt(setsockopt)]
fn sealane_setopt(ctx: SockoptContext) -> i32 {
    match guard::try_setsockopt(&ctx) {
        Ok(()) => ALLOW,
        Err(reason) => {
            count::add(reason);
            REFUSE
        }
    }
}

#[cgroup_sock_addr(getpeername4)]
fn sealane_peer4(ctx: SockAddrContext) -> i32 {
    peername::show_client4(&ctx);
    ALLOW
}

#[cgroup_sock_addr(getpeername6)]
fn sealane_peer6(ctx: SockAddrContext) -> i32 {
    peername::show_client6(&ctx);
    ALLOW
}

#[sock_ops]
fn sealane_sockops(ctx: SockOpsContext) -> u32 {
    sockops::follow(&ctx);
    1
}

#[sk_lookup]
fn sealane_lookup(ctx: SkLookupContext) -> u32 {
    match lookup::classify(&ctx) {
        Verdict::Pass => SK_PASS,
        Verdict::Steered => SK_PASS,
        Verdict::Drop(reason) => {
            count::add(reason);
            SK_DROP
        }
    }
}

/// The verifier rejects the endless loop, so a program that could panic does not load.
#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
