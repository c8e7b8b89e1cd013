/* Runs a policy on an emulated Cortex-M4: for each observation prints "ACTION..., as bits TICKS STACK-BYTES", in hex. */
#include <stdint.h>

#include "observations.h" /* OBSERVATIONS, INPUTS, ACTIONS and observation[OBSERVATIONS][INPUTS] */

void act(const float *observation, float *action);
int check(void);
void reset(void);

extern uint32_t data_source[], data_start[], data_end[], bss_start[], bss_end[], stack_top[];

#define STACK_WORDS 8192
#define UNTOUCHED 0xA5A5A5A5u
#define REGISTER(address) (*(volatile uint32_t *)(address))
#define SYSTICK_CONTROL REGISTER(0xE000E010)
#define SYSTICK_RELOAD REGISTER(0xE000E014)
#define SYSTICK_VALUE REGISTER(0xE000E018)
#define COPROCESSOR_ACCESS REGISTER(0xE000ED88)

/* Arm's semihosting: what the debugger, here the emulator, does for the program. */
static void ask_host(uint32_t operation, const void *argument)
{
    register uint32_t r0 __asm__("r0") = operation;
    register const void *r1 __asm__("r1") = argument;
    __asm__ volatile("bkpt 0xAB" : "+r"(r0) : "r"(r1) : "memory");
}

static void print(const char *text)
{
    ask_host(0x04, text);
}

static void print_hexadecimal(uint32_t value)
{
    char text[10] = "00000000 ";
    for (int digit = 7; digit >= 0; digit--, value >>= 4)
        text[digit] = "0123456789abcdef"[value & 15];
    print(text);
}

static void leave(uint32_t reason)
{
    ask_host(0x18, (const void *)reason);
    for (;;)
        ;
}

static void fault(void)
{
    print("fault\n");
    leave(0x20023);
}

/* Noinline: its frame ends where that of act begins. */
static void __attribute__((noinline)) measure(const float *input, float *action, uint32_t *ticks, uint32_t *stack)
{
    volatile uint32_t *top;
    __asm__ volatile("mov %0, sp" : "=r"(top));
    for (int word = 1; word <= STACK_WORDS; word++)
        top[-word] = UNTOUCHED;
    const uint32_t before = SYSTICK_VALUE;
    act(input, action);
    *ticks = (before - SYSTICK_VALUE) & 0xFFFFFF;
    int deepest = STACK_WORDS;
    while (deepest > 0 && top[-deepest] == UNTOUCHED)
        deepest--;
    *stack = 4 * deepest;
}

void reset(void)
{
    COPROCESSOR_ACCESS |= 0xF << 20; /* the floating-point unit */
    for (uint32_t *from = data_source, *to = data_start; to < data_end;)
        *to++ = *from++;
    for (uint32_t *to = bss_start; to < bss_end;)
        *to++ = 0;
    SYSTICK_RELOAD = 0xFFFFFF;
    SYSTICK_VALUE = 0;
    SYSTICK_CONTROL = 5; /* counts the processor's clock */
    for (int n = 0; n < OBSERVATIONS; n++) {
        union { float value[ACTIONS]; uint32_t bits[ACTIONS]; } action;
        uint32_t ticks, stack;
        measure(observation[n], action.value, &ticks, &stack);
        for (int a = 0; a < ACTIONS; a++)
            print_hexadecimal(action.bits[a]);
        print_hexadecimal(ticks);
        print_hexadecimal(stack);
        print("\n");
    }
    print_hexadecimal(check());
    print("\n");
    leave(0x20026);
}

static const struct { uint32_t *stack; void (*handlers[6])(void); } vectors __attribute__((section(".vectors"), used)) = {
    stack_top, {reset, fault, fault, fault, fault, fault},
};
