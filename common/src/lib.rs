//! What the kernel programs and the agent share: map keys and values, names, and the closed set of reasons.
//!
//! Read in this order: [`addr`], [`keys`], [`names`], [`reason`]; [`pod`] is the macro behind [`keys`].
#![no_std]

pub mod addr;
pub mod keys;
pub mod names;
pub mod pod;
pub mod reason;
