"""This module holds LLVM IR that replaces a GPU's own instructions; `executor.py` fills in the words in capitals."""

from __future__ import annotations

# An access is allowed inside the range that the same instruction used last, or inside a range of its list. Addresses
# are compared as signed numbers, so that none wraps into a range. An address must be a multiple of the access's width,
# because a GPU faults at any other.
CHECKS = """
@lists = global [3 x [2 x ptr]] zeroinitializer
@refused = global [3 x i64] zeroinitializer
@last = global [SITES x [2 x i64]] zeroinitializer
@shared = global [BYTES x i8] zeroinitializer, align 16

define internal i1 @within(i64 %address, i64 %width, ptr %range) alwaysinline {
  %low = load i64, ptr %range
  %high.at = getelementptr i64, ptr %range, i64 1
  %high = load i64, ptr %high.at
  %highest = sub i64 %high, %width
  %after = icmp sge i64 %address, %low
  %before = icmp sle i64 %address, %highest
  %inside = and i1 %after, %before
  %mask = sub i64 %width, 1
  %odd = and i64 %address, %mask
  %even = icmp eq i64 %odd, 0
  %good = and i1 %inside, %even
  ret i1 %good
}

define internal i1 @search(i64 %address, i64 %width, i64 %list, ptr %last) noinline {
start:
  %first.at = getelementptr [2 x ptr], ptr @lists, i64 %list
  %first = load ptr, ptr %first.at
  %end.at = getelementptr ptr, ptr %first.at, i64 1
  %end = load ptr, ptr %end.at
  br label %loop
loop:
  %range = phi ptr [ %first, %start ], [ %next, %test ]
  %over = icmp eq ptr %range, %end
  br i1 %over, label %refuse, label %test
test:
  %next = getelementptr [2 x i64], ptr %range, i64 1
  %good = call i1 @within(i64 %address, i64 %width, ptr %range)
  br i1 %good, label %keep, label %loop
keep:
  %value = load [2 x i64], ptr %range
  store [2 x i64] %value, ptr %last
  ret i1 true
refuse:
  %count = load i64, ptr @refused
  %count.next = add i64 %count, 1
  store i64 %count.next, ptr @refused
  store i64 %address, ptr getelementptr (i64, ptr @refused, i64 1)
  store i64 %width, ptr getelementptr (i64, ptr @refused, i64 2)
  ret i1 false
}

define internal i1 @allowed(ptr %pointer, i1 %on, i64 %width, i64 %list, i64 %site) alwaysinline {
  br i1 %on, label %check, label %no
check:
  %address = ptrtoint ptr %pointer to i64
  %last = getelementptr [2 x i64], ptr @last, i64 %site
  %again = call i1 @within(i64 %address, i64 %width, ptr %last)
  br i1 %again, label %yes, label %look
look:
  %found = call i1 @search(i64 %address, i64 %width, i64 %list, ptr %last)
  ret i1 %found
yes:
  ret i1 true
no:
  ret i1 false
}
"""

LOAD = """
define internal RESULT @access.SITE(OPERANDS) alwaysinline {
start:
BEFORE
  %allowed = call i1 @allowed(ptr ADDRESS, i1 ON, i64 WIDTH, i64 LIST, i64 SITE)
  br i1 %allowed, label %access, label %end
access:
  %there = load VECTOR, ptr ADDRESS
  br label %end
end:
  %loaded = phi VECTOR [ VALUE, %start ], [ %there, %access ]
AFTER
}
"""

STORE = """
define internal void @access.SITE(OPERANDS) alwaysinline {
BEFORE
  %allowed = call i1 @allowed(ptr ADDRESS, i1 ON, i64 WIDTH, i64 LIST, i64 SITE)
  br i1 %allowed, label %access, label %end
access:
  store VECTOR VALUE, ptr ADDRESS
  br label %end
end:
  ret void
}
"""

# ROUND rounds to nearest even. It recognizes NaN by comparing the value, and gives the NaN of NVIDIA's conversion.
ROUND = """
define internal TARGET @NAME(SOURCE %x) alwaysinline {
  %f = bitcast SOURCE %x to <COUNT x float>
  %bits = bitcast SOURCE %x to <COUNT x i32>
  %high = lshr <COUNT x i32> %bits, splat (i32 16)
  %odd = and <COUNT x i32> %high, splat (i32 1)
  %bias = add <COUNT x i32> %odd, splat (i32 32767)
  %sum = add <COUNT x i32> %bits, %bias
  %rounded = lshr <COUNT x i32> %sum, splat (i32 16)
  %nan = fcmp uno <COUNT x float> %f, zeroinitializer
  %chosen = select <COUNT x i1> %nan, <COUNT x i32> splat (i32 32767), <COUNT x i32> %rounded
  %low = trunc <COUNT x i32> %chosen to <COUNT x i16>
  %result = bitcast <COUNT x i16> %low to TARGET
  ret TARGET %result
}
"""

# PRODUCT replaces mul.rn.f32 by LLVM's fmul; without flags LLVM may not fuse it with a sum.
PRODUCT = """
define internal float @product(float %x, float %y) alwaysinline {
  %p = fmul float %x, %y
  ret float %p
}
"""

WIDEN = """
define internal TARGET @NAME(SOURCE %x) alwaysinline {
  %low = bitcast SOURCE %x to <COUNT x i16>
  %wide = zext <COUNT x i16> %low to <COUNT x i32>
  %bits = shl <COUNT x i32> %wide, splat (i32 16)
  %result = bitcast <COUNT x i32> %bits to TARGET
  ret TARGET %result
}
"""

# KERNEL runs all threads of the programs from begin to end, one after another.
KERNEL = """
define internal void @ENTRY(PARAMETERS, i32 %ctaid, i32 %tid) alwaysinline {
BODY
}

define void @drive(PARAMETERS, i32 %begin, i32 %end) {
start:
  br label %programs
programs:
  %program = phi i32 [ %begin, %start ], [ %program.next, %after ]
  br label %threads
threads:
  %thread = phi i32 [ 0, %programs ], [ %thread.next, %threads ]
  call void @ENTRY(PARAMETERS, i32 %program, i32 %thread)
  %thread.next = add i32 %thread, 1
  %more = icmp ult i32 %thread.next, THREADS
  br i1 %more, label %threads, label %after
after:
  %program.next = add i32 %program, 1
  %again = icmp ult i32 %program.next, %end
  br i1 %again, label %programs, label %stop
stop:
  ret void
}
"""

# Each thread of a kernel with barriers is a coroutine, and every barrier suspends it.
COROUTINE = """
define ptr @ENTRY(PARAMETERS, i32 %ctaid, i32 %tid) presplitcoroutine {
enter:
  %id = call token @llvm.coro.id(i32 0, ptr null, ptr null, ptr null)
  %size = call i64 @llvm.coro.size.i64()
  %frame = call ptr @malloc(i64 %size)
  %handle = call ptr @llvm.coro.begin(token %id, ptr %frame)
  br label %FIRST
FIRST:
BODY
unreached:
  unreachable
clean:
  %memory = call ptr @llvm.coro.free(token %id, ptr %handle)
  call void @free(ptr %memory)
  br label %leave
leave:
  call void @llvm.coro.end(ptr %handle, i1 false, token none)
  ret ptr %handle
}

define void @resume(ptr %handle) {
  call void @llvm.coro.resume(ptr %handle)
  ret void
}

define i1 @done(ptr %handle) {
  %done = call i1 @llvm.coro.done(ptr %handle)
  ret i1 %done
}

define void @destroy(ptr %handle) {
  call void @llvm.coro.destroy(ptr %handle)
  ret void
}

declare ptr @malloc(i64)
declare void @free(ptr)
"""

SUSPEND = """  %state.NUMBER = call i8 @llvm.coro.suspend(token none, i1 LAST)
  switch i8 %state.NUMBER, label %leave [
    i8 0, label %NEXT
    i8 1, label %clean
  ]"""
